"""Linear layers of a trunk, stored in fewer bits."""

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.measure import LiveBytes
from e3va_mm.numerics.stored_weights import (
    coarse_keys,
    make_room,
    plain,
    store,
)

SIXTEEN = dict(bf16=torch.bfloat16, fp16=torch.float16)
needs_torchao = pytest.mark.skipif(
    not importlib.util.find_spec('torchao'), reason='needs torchao'
)
INT8 = pytest.param('int8', marks=needs_torchao)


def layers():
    """40 x 24 and 16 x 40 weights, one with a bias; a norm between."""
    module = nn.Sequential(
        nn.Linear(24, 40),
        nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 16, bias=False)),
    )
    return module.requires_grad_(False)


def stored_bytes(module):
    """Of all parameters, counted by storage."""
    return LiveBytes(module).now['weights']


@pytest.mark.parametrize(
    'kind, keys',
    [
        (None, []),
        ('fp32', []),
        ('bf16', ['0.weight', '0.bias', '1.1.weight']),
        ('fp16', ['0.weight', '0.bias', '1.1.weight']),
    ],
)
def test_floats_round_the_linear_layers_alone(kind, keys):
    module = layers()
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    assert list(coarse_keys(module, kind)) == keys
    store(module, kind)
    for name, value in module.state_dict().items():
        dtype = SIXTEEN[kind] if name in keys else torch.float32
        assert value.dtype is dtype
        assert torch.equal(value, before[name].to(dtype))
    values = 24 * 40 + 40 + 40 * 16
    width = 2 if keys else 4
    assert stored_bytes(module) == width * values + 4 * 2 * 40  # the norm
    # Optimizers and hooks may hold them.
    for parameter, held in zip(module.parameters(), parameters, strict=True):
        assert parameter is held and not parameter.requires_grad


@needs_torchao
def test_int8_has_a_scale_for_each_output_channel():
    module = layers()
    with torch.no_grad():
        # One scale for all would round the first channels to nothing.
        module[0].weight.mul_(torch.logspace(-4, 0, 40)[:, None])
    weight = module[0].weight.detach().clone()
    untouched = [module[0].bias, module[1][0].weight, module[1][0].bias]
    copies = [value.clone() for value in untouched]
    assert list(coarse_keys(module, 'int8')) == ['0.weight', '1.1.weight']
    store(module, 'int8')
    # A value, and for each output channel a scale and a zero point.
    eight = (24 * 40 + 40 * 5) + (40 * 16 + 16 * 5)
    assert stored_bytes(module) <= eight + 4 * (40 + 2 * 40)
    error = (plain(module[0].weight) - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert (error <= 0.51 * step).all()
    assert (error.amax(1) > 0.1 * step[:, 0]).any()
    assert not any(p.requires_grad for p in module.parameters())
    for value, before in zip(untouched, copies, strict=True):
        assert torch.equal(value, before)


@needs_torchao
@pytest.mark.parametrize('dtype', [torch.float32, *SIXTEEN.values()])
def test_int8_layers_compute_in_any_type(dtype):
    layer = nn.Sequential(nn.Linear(24, 40)).requires_grad_(False)
    store(layer, 'int8')
    weight, bias = layer[0].weight, layer[0].bias
    x = torch.randn(7, 24)
    expected = x @ plain(weight).t() + bias
    got = nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert got.dtype is dtype
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=rtol)


@needs_torchao
def test_room_for_new_weights_after_int8():
    module = layers()
    new = {n: torch.randn_like(v) for n, v in module.state_dict().items()}
    for _ in range(2):
        store(module, 'int8')
        make_room(module)
        module.load_state_dict(new)
        for name, parameter in module.named_parameters():
            assert type(parameter) is nn.Parameter
            assert not parameter.requires_grad
            assert torch.equal(parameter, new[name])
    assert stored_bytes(module) == stored_bytes(layers())


@pytest.mark.parametrize('kind', ['bf16', INT8])
@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_stored_alike_and_independent(kind, copied):
    module = layers()
    store(module, kind)
    weight = plain(module[0].weight).float()
    twin = copied(module)
    assert stored_bytes(twin) == stored_bytes(module)
    assert torch.equal(plain(twin[0].weight).float(), weight)
    make_room(twin)
    twin.load_state_dict(layers().state_dict())
    assert torch.equal(plain(module[0].weight).float(), weight)


def test_without_torchao_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    module = layers()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigError) as error:
        store(module, 'int8')
    text = str(error.value)
    assert "`tuner.trunk_weights='int8'` needs torchao" in text
    assert 'pip install torchao' in text
    assert "`trunk_weights='bf16'`" in text
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
