"""Stock configs that decay the learning rate layer by layer."""

import copy
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from e3va_mm.engine.optim import cover_layer_decay
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
    'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py': (
        dict(PLAIN, backbone=dict(SMALL_VIT, img_size=64)),
        dict(type='e3va_mm.E3VAVisionTransformer', trunk_type='mmseg.MAE'),
    ),
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': (
        dict(HEADS, backbone=SMALL_CONVNEXT),
        None,
    ),
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py': (
        dict(
            neck=dict(in_channels=[64, 128, 256, 512]),
            backbone=SMALL_CONVNEXT,
        ),
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
    assert len(side) > 20
    parameters = dict(built.named_parameters())
    for key, group in side.items():
        flat = parameters[key].ndim == 1
        expected = 0.0 if flat else decay
        if name == 'mmpretrain':  # its key sets the decay of all
            expected = 0.5 * decay
        assert figures(group) == pytest.approx((rate, expected)), key


@pytest.mark.parametrize('name', CASES)
def test_models_without_a_side_path_keep_the_stock_groups(name):
    scope, model, optimizer = config_of(name)
    # In force from here on.
    groups_of(scope, ours(name, copy.deepcopy(model)), optimizer)
    built, found = groups_of(scope, copy.deepcopy(model), optimizer)
    registered = constructor_of(scope, optimizer['constructor'])
    stock = registered.__mro__[2]
    assert stock.__module__.startswith(f'{scope}.engine')
    assert registered.__name__ == stock.__name__
    options = copy.deepcopy(optimizer)
    del options['constructor']
    constructor = stock(options, options.pop('paramwise_cfg'))
    names = {id(p): k for k, p in built.named_parameters()}
    for group in constructor(built).optimizer.param_groups:
        for parameter in group['params']:
            own = found[names[id(parameter)]]
            assert {k: v for k, v in own.items() if k != 'params'} == {
                k: v for k, v in group.items() if k != 'params'
            }
    assert any(g['lr'] < optimizer['optimizer']['lr'] for g in found.values())


def constructor_of(scope, name):
    registry = sys.modules[f'{scope}.registry'].OPTIM_WRAPPER_CONSTRUCTORS
    return registry.module_dict[name]


@pytest.mark.parametrize('name', ['mmpretrain', [*CASES][0]])
def test_a_key_that_names_the_side_path_scales_it(name):
    scope, model, optimizer = config_of(name)
    keys = optimizer['paramwise_cfg'].setdefault('custom_keys', {})
    keys['backbone.side_path'] = dict(lr_mult=3.0)
    _, groups = groups_of(scope, ours(name, model), optimizer)
    rate = optimizer['optimizer']['lr']
    key = 'backbone.side_path.stages.0.0.attn.down.p'
    assert groups[key]['lr'] == pytest.approx(3.0 * rate)
    heads = [k for k in groups if k.endswith('head.conv_seg.weight')]
    heads += [k for k in groups if k.startswith('head.')]
    assert groups[heads[0]]['lr'] == pytest.approx(rate)


def test_one_line_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(
        'e3va_mm.engine.optim.layer_decay.print_log',
        lambda line, logger: said.append(line),
    )
    scope, model, optimizer = config_of('mmpretrain')
    groups_of(scope, copy.deepcopy(model), optimizer)
    assert said == []
    groups_of(scope, ours('mmpretrain', model), optimizer)
    assert said == [
        'LearningRateDecayOptimWrapperConstructor: no layer of the frozen '
        'trunk has a rate to decay; side path and heads train at the base '
        'learning rate.'
    ]


def test_without_weight_decay():
    scope, model, optimizer = config_of([*CASES][2])
    del optimizer['optimizer']['weight_decay']
    _, groups = groups_of(scope, ours([*CASES][2], model), optimizer)
    assert {g['weight_decay'] for g in groups.values()} == {0.01}  # AdamW's


def test_more_calls_change_nothing():
    cover_layer_decay()
    name = 'LearningRateDecayOptimWrapperConstructor'
    before = constructor_of('mmpretrain', name)
    cover_layer_decay()
    assert constructor_of('mmpretrain', name) is before


def test_a_framework_that_cannot_be_imported_is_left_alone(monkeypatch):
    import mmpretrain.registry as half_installed

    def fails():
        raise RuntimeError('operator torchvision::nms does not exist')

    registry = half_installed.OPTIM_WRAPPER_CONSTRUCTORS
    monkeypatch.setattr(registry, 'import_from_location', fails)
    cover_layer_decay()


# Our backbone is there before the framework's optimizers, and after them.
ORDER = """
import sys
import e3va_mm.registry
{first}
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
import mmdet.registry
assert ('mmdet.engine.optimizers' in sys.modules) is {imported}
init_default_scope('mmdet')
model = torch.nn.Module()
model.backbone = MODELS.build(dict(
    type='e3va_mm.E3VASwinTransformer', embed_dims=32, depths=(1, 1),
    num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)))
wrapper = build_optim_wrapper(model, dict(
    optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5),
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_rate=0.5, num_layers=6)))
assert {{group['lr'] for group in wrapper.optimizer.param_groups}} == {{1.0}}
"""


@pytest.mark.parametrize('first', ['', 'import mmdet.engine.optimizers'])
def test_either_may_be_imported_first(first):
    code = ORDER.format(first=first, imported=bool(first))
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
