"""Stock configs that decay the learning rate layer by layer."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    build_optim_wrapper,
)
from mmengine.registry import MODELS, DefaultScope

from e3va_mm.frameworks import optimizer_groups
from tests.trunk_cases import VIT

pytest.importorskip('mmpretrain')
STOCK = {
    name: Path(importlib.util.find_spec(name).origin).parent / '.mim/configs'
    for name in ('mmdet', 'mmseg')
}
HEADS = dict(
    decode_head=dict(in_channels=[64, 128, 256, 512], channels=16),
    auxiliary_head=dict(in_channels=256, channels=16),
)
SMALL_VIT = dict(embed_dims=32, num_layers=4, num_heads=4, out_indices=(1, 3))
PLAIN = dict(
    neck=dict(embed_dim=32, rescales=[2, 1]),
    decode_head=dict(in_channels=[32, 32], in_index=[0, 1], channels=16),
    auxiliary_head=dict(in_channels=32, in_index=1, channels=16),
)
SMALL_CONVNEXT = dict(arch='pico')
# Stock config -> what makes it small, and its one changed line.
CASES = {
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py': (
        dict(PLAIN, backbone=dict(SMALL_VIT, img_size=64)),
        dict(type='e3va_mm.E3VAVisionTransformer', trunk_type='mmseg.BEiT'),
    ),
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': (
        dict(HEADS, backbone=SMALL_CONVNEXT),
        None,
    ),
    # Heads share their convolutions.
    'mmdet::rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py': (
        dict(
            neck=dict(in_channels=[128, 256, 512]),
            backbone=SMALL_CONVNEXT,
        ),
        None,
    ),
    'mmpretrain': (
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(
                type='mmpretrain.VisionTransformer', arch=VIT, img_size=64
            ),
            head=dict(
                type='mmpretrain.VisionTransformerClsHead',
                num_classes=3,
                in_channels=32,
                hidden_dim=16,
            ),
        ),
        dict(type='e3va_mm.E3VAVisionTransformer'),
    ),
}
PRETRAIN = dict(
    optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5),
    constructor='LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.75,
        norm_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            'head.layers.pre': dict(lr_mult=0.1, decay_mult=0.25),
            'backbone': dict(lr_mult=0.1, decay_mult=0.5),
        },
    ),
)


def config_of(name):
    """Scope, model and optimizer of a small stock config."""
    small, _ = CASES[name]
    scope = name.partition(':')[0]
    if scope == name:
        return scope, copy.deepcopy(small), copy.deepcopy(PRETRAIN)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path = STOCK[scope] / name.rpartition(':')[2]
        text = f'_base_ = {str(path)!r}\nmodel = {small!r}\n'
        config = Config.fromstring(text, '.py')
    drop_weights(config.model)
    optimizer = config.optim_wrapper.to_dict()
    optimizer['type'] = 'OptimWrapper'
    optimizer.pop('loss_scale', None)
    return scope, config.model, optimizer


def drop_weights(model):
    model.pop('pretrained', None)
    model.backbone.pop('init_cfg', None)


def ours(name, model):
    """Its one changed line."""
    _, line = CASES[name]
    stock = model['backbone']
    model['backbone'] = (
        dict(stock, **line)
        if line
        else dict(type='e3va_mm.E3VABackbone', trunk=stock)
    )
    return model


def groups_of(scope, model, optimizer):
    """The built model, and name of a parameter -> its group."""
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(model)
        wrapper = build_optim_wrapper(built, optimizer)
    names = {id(p): name for name, p in built.named_parameters()}
    return built, {
        names[id(p)]: group
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }


def figures(group):
    return group['lr'], group['weight_decay']


@pytest.mark.parametrize('name', CASES)
def test_heads_as_in_the_stock_groups_side_path_at_the_base_rate(name):
    scope, model, optimizer = config_of(name)
    _, stock = groups_of(scope, copy.deepcopy(model), optimizer)
    built, groups = groups_of(scope, ours(name, model), optimizer)
    assert set(groups) == {
        k for k, p in built.named_parameters() if p.requires_grad
    }
    rate, decay = (optimizer['optimizer'][k] for k in ('lr', 'weight_decay'))
    heads = {k: g for k, g in stock.items() if not k.startswith('backbone.')}
    assert heads
    for key, group in heads.items():
        assert figures(groups[key]) == pytest.approx(figures(group)), key
    side = {k: g for k, g in groups.items() if k.startswith('backbone.')}
    assert len(side) >= 8
    parameters = dict(built.named_parameters())
    for key, group in side.items():
        flat = parameters[key].ndim == 1 or key.endswith('.bias')
        expected = 0.0 if flat else decay
        if name == 'mmpretrain':  # its key sets the decay of all
            expected = 0.5 * decay
        assert figures(group) == pytest.approx((rate, expected)), key


@pytest.mark.parametrize('name', CASES)
def test_models_without_a_side_path_keep_the_stock_groups(name, monkeypatch):
    scope, model, optimizer = config_of(name)
    _, found = groups_of(scope, copy.deepcopy(model), optimizer)
    monkeypatch.setattr(
        DefaultOptimWrapperConstructor,
        '__call__',
        optimizer_groups._stock_call,
    )
    _, stock = groups_of(scope, copy.deepcopy(model), optimizer)
    assert found.keys() == stock.keys()
    for key, group in stock.items():
        assert figures(found[key]) == figures(group)
    assert any(g['lr'] < optimizer['optimizer']['lr'] for g in found.values())


def test_a_tuner_inside_trains_at_the_base_rate_too():
    scope, model, optimizer = config_of([*CASES][0])
    del model['backbone']['type']
    model['backbone'] = dict(
        type='e3va_mm.PETLBackbone',
        trunk=dict(type='mmseg.BEiT', **model['backbone']),
        method=dict(type='e3va_mm.Adapter'),
        allow_random_trunk=True,
    )
    built, groups = groups_of(scope, model, optimizer)
    assert {g['lr'] for g in groups.values()} == {optimizer['optimizer']['lr']}
    assert groups.keys() == {
        n for n, p in built.named_parameters() if p.requires_grad
    }


class OwnGroups(DefaultOptimWrapperConstructor):
    def add_params(self, params, module, **kwargs):
        params.append(dict(params=[*module.parameters()], lr=7.0))


def test_a_constructor_with_groups_of_its_own_keeps_them():
    scope, model, optimizer = config_of('mmpretrain')
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(ours('mmpretrain', model))
        options = dict(optimizer=optimizer['optimizer'])
        wrapper = OwnGroups(options, dict(any=1))(built)
    assert [g['lr'] for g in wrapper.optimizer.param_groups] == [7.0]


@pytest.mark.parametrize('name', ['mmpretrain', [*CASES][0]])
def test_a_key_that_names_the_side_path_scales_it(name):
    scope, model, optimizer = config_of(name)
    keys = optimizer['paramwise_cfg'].setdefault('custom_keys', {})
    keys['backbone.side_path'] = dict(lr_mult=3.0)
    _, groups = groups_of(scope, ours(name, model), optimizer)
    rate = optimizer['optimizer']['lr']
    key = 'backbone.side_path.stages.0.down.p'
    assert groups[key]['lr'] == pytest.approx(3.0 * rate)
    heads = [k for k in groups if k.endswith('head.conv_seg.weight')]
    heads += [k for k in groups if k.startswith('head.')]
    assert groups[heads[0]]['lr'] == pytest.approx(rate)


def test_one_line_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(
        'e3va_mm.frameworks.optimizer_groups.print_log',
        lambda line, logger: said.append(line),
    )
    scope, model, optimizer = config_of('mmpretrain')
    groups_of(scope, copy.deepcopy(model), optimizer)
    assert said == []
    groups_of(scope, ours('mmpretrain', model), optimizer)
    assert said == [
        'LearningRateDecayOptimWrapperConstructor: no layer of the frozen '
        'trunk has a rate to decay; what the tuner adds and heads train at '
        'the base learning rate.'
    ]


def test_without_weight_decay():
    name = [*CASES][1]
    scope, model, optimizer = config_of(name)
    del optimizer['optimizer']['weight_decay']
    _, groups = groups_of(scope, ours(name, model), optimizer)
    assert {g['weight_decay'] for g in groups.values()} == {0.01}  # AdamW's
