"""A changed value of what is frozen is found, and nothing else is."""

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from e3va_mm.engine.frozen_tensors import SAMPLES, FrozenTensors
from tests.helpers import build_e3va
from tests.trunk_cases import (
    CASES,
    SIZES,
    awake,
    build_ours,
    flat,
    image_for,
    need,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.trunk.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50))
        self.mixed = nn.BatchNorm1d(4)
        self.mixed.bias.requires_grad_(False)
        self.register_buffer('step', torch.zeros(()))


TRUNK = [
    *('trunk.0.weight', 'trunk.0.bias', 'trunk.1.weight', 'trunk.1.bias'),
    'mixed.bias',
    *('trunk.1.running_mean', 'trunk.1.running_var'),
    'trunk.1.num_batches_tracked',
]


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_frozen_are_parameters_and_the_buffers_of_frozen_modules():
    model = Model()
    assert FrozenTensors(model).names == TRUNK
    assert FrozenTensors(model, TRUNK[1:]).names == TRUNK[:1]
    assert FrozenTensors(nn.Linear(2, 2)).names == []
    assert FrozenTensors(nn.Linear(2, 2)).changed() == []


@pytest.mark.parametrize('full', [False, True])
def test_each_frozen_tensor_is_found_alone(full):
    model = Model()
    frozen = FrozenTensors(model)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            before = tensor.clone()
            tensor.add_(1)
            expected = [name] if name in TRUNK else []
            assert frozen.changed(full) == expected, name
            tensor.copy_(before)
    assert frozen.changed(full) == []


def test_the_full_look_sees_one_value_of_many():
    layer = nn.Linear(1000, 100, bias=False).requires_grad_(False)
    frozen = FrozenTensors(layer)
    with torch.no_grad():
        layer.weight[1, 1] += 1e-6
    assert layer.weight.numel() // SAMPLES > 1
    assert frozen.changed() == []
    assert frozen.changed(full=True) == ['weight']
    with torch.no_grad():
        layer.weight += 1e-6
    assert frozen.changed() == ['weight']


def test_nan_equals_itself_and_signs_of_zero_do_not():
    layer = nn.Linear(2, 2).requires_grad_(False)
    nn.init.constant_(layer.bias, float('nan'))
    nn.init.zeros_(layer.weight)
    frozen = FrozenTensors(layer)
    assert frozen.changed() == frozen.changed(full=True) == []
    layer.weight.neg_()
    assert frozen.changed() == frozen.changed(full=True) == ['weight']


def test_what_is_missing_or_has_another_type_has_changed():
    model = Model()
    frozen = FrozenTensors(model)
    model.trunk[1].half()
    del model.trunk[0].bias
    changed = [n for n in TRUNK if 'trunk.1' in n and 'num' not in n]
    assert set(frozen.changed()) == {'trunk.0.bias', *changed}
    assert frozen.changed() == frozen.changed(full=True)


def test_averages_and_caches_may_change():
    model = Model()
    model.average = ExponentialMovingAverage(model.head)
    model.average_of_a_trunk = nn.Sequential(
        ExponentialMovingAverage(nn.Sequential(model.trunk))
    )
    model.trunk.register_buffer('seen', torch.zeros(2), persistent=False)
    model.trunk.register_buffer('kept', torch.zeros(2))
    names = FrozenTensors(model).names
    assert set(names) == {*TRUNK, 'trunk.kept'}
    assert FrozenTensors(model.average).names == []


def test_caches_of_trunks_may_not_change():
    backbone = build_e3va()
    backbone.stages.register_buffer('seen', torch.ones(2), persistent=False)
    assert 'stages.seen' in FrozenTensors(backbone).names


@pytest.mark.parametrize('full', [False, True])
def test_what_trains_by_now_may_change(full):
    model = Model()
    frozen = FrozenTensors(model)
    model.trunk[1].requires_grad_(True)
    with torch.no_grad():
        for tensor in tensors(model.trunk).values():
            tensor.add_(1)
    first = [name for name in TRUNK if name.startswith('trunk.0')]
    assert frozen.changed(full) == first
    assert frozen.names == [*first, 'mixed.bias']
    # Its former values matter no more.
    model.trunk[1].requires_grad_(False)
    assert frozen.changed(full) == first


@pytest.mark.parametrize('weights', [None, 'bf16', 'int8'])
def test_trunks_store_their_weights_at_the_first_pass(weights):
    if weights == 'int8':
        pytest.importorskip('torchao')
    backbone = build_e3va(side_path=dict(trunk_weights=weights))
    frozen = FrozenTensors(backbone)
    owned = {name for name, _ in backbone.trainable_children()}
    assert {n.split('.')[0] for n in frozen.names}.isdisjoint(owned)
    assert set(backbone.trunk_state()) <= set(frozen.names)

    picture = torch.randn(1, 3, 64, 64)
    backbone(picture)
    key = 'stages.0.blocks.0.attn.w_msa.qkv.weight'
    assert (key in frozen.changed()) == (weights is not None)
    frozen.accept_new_forms()
    backbone(picture)[0].sum().backward()
    assert frozen.changed() == frozen.changed(full=True) == []

    layer = backbone.stages[0].blocks[0].attn.w_msa.qkv
    with torch.no_grad():
        if weights == 'int8':
            part = layer.weight.__tensor_flatten__()[0][0]
            getattr(layer.weight, part).add_(1)
        else:
            layer.weight.mul_(1.5)
    assert frozen.changed() == frozen.changed(full=True) == [key]


@pytest.mark.parametrize('name', CASES)
def test_training_steps_change_no_trunk(name):
    need(CASES[name])
    backbone = awake(build_ours(name)).train()
    frozen = FrozenTensors(backbone)
    assert len(frozen.names) > 10
    images = [image_for(name)]
    if name not in SIZES:
        images.append(torch.randn(2, 3, 64, 128))
    for image in images:
        outputs = flat(backbone(image))
        sum(output.sum() for output in outputs).backward()
        frozen.accept_new_forms()
        assert frozen.changed(full=True) == []
