"""Groups of the optimizer, under the default constructor's own name too."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from e3va_mm.registry import MODELS
from tests.helpers import TINY, build_e3va, build_stock
from tests.trunk_cases import build_ours


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(4, 4)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)


OPTIMIZER = dict(type='AdamW', lr=1.0, weight_decay=0.5)
# What stock Swin configs hold, each with a trap for names of ours.
PARAMWISE = [
    dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
    dict(custom_keys={'backbone': dict(lr_mult=0.0)}),
    dict(
        custom_keys={
            'backbone': dict(lr_mult=0.1, decay_mult=1.0),
            'backbone.norm': dict(lr_mult=0.1, decay_mult=0.0),
            'absolute_pos_embed': dict(lr_mult=0.1, decay_mult=0.0),
            'stages.0': dict(lr_mult=0.1),
        }
    ),
    dict(bias_lr_mult=0.1, norm_decay_mult=0.0),
]


def groups_of(model, **options):
    wrapper = build_optim_wrapper(model, dict(optimizer=OPTIMIZER, **options))
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: group
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }


@pytest.mark.parametrize(
    'constructor',
    [
        None,
        'DefaultOptimWrapperConstructor',
        'e3va_mm.SidePathOptimWrapperConstructor',
    ],
)
@pytest.mark.parametrize('paramwise_cfg', [None, *PARAMWISE])
def test_side_path_has_the_base_rate_and_frozen_parameters_no_group(
    constructor, paramwise_cfg
):
    model = Model(build_e3va())
    options = dict(paramwise_cfg=paramwise_cfg)
    if constructor:
        options['constructor'] = constructor
    groups = groups_of(model, **options)
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    assert set(groups) == trainable
    side = [k for k in trainable if k.startswith('backbone.')]
    assert len(side) > 30
    for name in side:
        assert groups[name]['lr'] == 1.0, name
        assert groups[name]['weight_decay'] == (
            0.0 if 'norm' in name and paramwise_cfg in PARAMWISE[2:] else 0.5
        )


def test_a_key_that_names_the_side_path_scales_it():
    model = Model(build_e3va())
    groups = groups_of(
        model,
        paramwise_cfg=dict(
            custom_keys={
                'backbone': dict(lr_mult=0.1),
                'backbone.side_path': dict(lr_mult=3.0, decay_mult=0.0),
            }
        ),
    )
    group = groups['backbone.side_path.stages.0.down.p']
    assert (group['lr'], group['weight_decay']) == (3.0, 0.0)
    assert groups['backbone.norm0.weight']['lr'] == 1.0


def test_a_key_that_names_an_output_norm_scales_it():
    model = Model(build_e3va())
    keys = {
        'backbone': dict(lr_mult=0.1),
        'backbone.norm': dict(lr_mult=0.1),
        'backbone.norm0': dict(lr_mult=3.0),
    }
    groups = groups_of(model, paramwise_cfg=dict(custom_keys=keys))
    assert groups['backbone.norm0.weight']['lr'] == 3.0
    assert groups['backbone.norm1.weight']['lr'] == 1.0


# Trunk, key, a parameter that it is about, whether it can mean only that.
NAMES = [
    ('mmseg beit', 'backbone.ln1', 'ln1.weight', True),
    ('mmseg beit', 'ln1', 'ln1.weight', True),
    ('mmseg beit', 'backbone.ln1.bias', 'ln1.bias', True),
    ('mmseg beit', 'backbone.ln', 'ln1.weight', False),
    ('mmseg beit', 'n1', 'ln1.weight', False),
    ('sam', 'backbone.channel_reduction', 'channel_reduction.0.weight', True),
    ('sam', 'channel_reduction.1', 'channel_reduction.1.weight', True),
    ('sam', 'backbone.channel', 'channel_reduction.0.weight', False),
    ('convnext', 'norm2', 'norm2.weight', True),
    ('convnext', 'norm', 'norm2.weight', False),
    ('svt', 'side_path.output', 'side_path.output_norms.0.weight', True),
    ('svt', 'output_norms', 'side_path.output_norms.0.weight', False),
]


@pytest.mark.parametrize('prefix', ['backbone', 'detector.backbone'])
@pytest.mark.parametrize('trunk, key, parameter, named', NAMES)
def test_parts_that_train_are_named_by_their_paths(
    prefix, trunk, key, parameter, named
):
    model = Model(build_ours(trunk))
    if prefix != 'backbone':
        outer = nn.Module()
        outer.detector = model
        model = outer
    groups = groups_of(
        model, paramwise_cfg=dict(custom_keys={key: dict(lr_mult=3.0)})
    )
    assert groups[f'{prefix}.{parameter}']['lr'] == (3.0 if named else 1.0)


@pytest.mark.parametrize('paramwise_cfg', [None, PARAMWISE[0]])
def test_other_models_keep_the_default_groups(paramwise_cfg):
    model = Model(build_stock())
    groups = groups_of(model, paramwise_cfg=paramwise_cfg)
    scaled = paramwise_cfg is not None
    assert groups['backbone.norm0.weight']['lr'] == (0.1 if scaled else 1.0)
    # The default puts frozen parameters in the one group; so be it there.
    assert ('fixed.weight' in groups) is not scaled


def test_frozen_parameters_have_no_optimizer_state():
    model = Model(build_e3va())
    wrapper = build_optim_wrapper(model, dict(optimizer=OPTIMIZER))
    outputs = model.backbone(torch.randn(1, 3, 64, 64))
    wrapper.update_params(sum(output.square().sum() for output in outputs))
    held = {id(p) for p in wrapper.optimizer.state}
    assert held == {
        id(p) for p in model.backbone.parameters() if p.requires_grad
    }


def build_rival(kind, **trunk):
    return MODELS.build(
        dict(
            type='e3va_mm.PETLSwinTransformer',
            method=dict(type=f'e3va_mm.{kind}'),
            allow_random_trunk=True,
            **TINY,
        )
    )


@pytest.mark.parametrize('kind', ['Full', 'BitFit', 'LoRA', 'Mona', 'Fixed'])
@pytest.mark.parametrize('paramwise_cfg', [None, *PARAMWISE])
def test_rivals_have_no_frozen_parameters_in_a_group(kind, paramwise_cfg):
    model = Model(build_rival(kind))
    model.fixed.requires_grad_(True)
    rules = {'paramwise_cfg': paramwise_cfg} if paramwise_cfg else {}
    groups = groups_of(model, **rules)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == trainable


def test_what_a_rival_adds_has_the_base_rate_and_stock_weights_their_own():
    rules = dict(paramwise_cfg=PARAMWISE[0])
    added = groups_of(Model(build_rival('LoRA')), **rules)
    name = 'backbone.petl.updates.0.down.0'
    assert added[name]['lr'] == 1.0
    stock = groups_of(Model(build_rival('BitFit')), **rules)
    name = 'backbone.stages.0.blocks.0.attn.w_msa.qkv.bias'
    assert stock[name]['lr'] == 0.1


def test_the_rate_of_what_a_rival_adds_is_scaled_by_its_name():
    rules = dict(paramwise_cfg=dict(custom_keys={'petl': dict(lr_mult=0.5)}))
    groups = groups_of(Model(build_rival('LoRA')), **rules)
    assert groups['backbone.petl.updates.0.down.0']['lr'] == 0.5


def test_nothing_of_a_rival_is_hidden_afterwards():
    model = Model(build_rival('LoRA'))
    before = [name for name, _ in model.named_parameters()]
    groups_of(model, paramwise_cfg=PARAMWISE[0])
    assert [name for name, _ in model.named_parameters()] == before


def test_an_optimizer_that_is_not_there_is_named():
    optimizer = dict(OPTIMIZER, type='AdamV')
    with pytest.raises(KeyError, match='AdamV is not in the optimizer regis'):
        build_optim_wrapper(nn.Linear(4, 4), dict(optimizer=optimizer))
