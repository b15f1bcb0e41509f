"""Options of a frozen trunk, and the type that follows from them."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import autocast_dtype, autocast_off
from e3va_mm.trunks import TrunkOptions


def test_options_are_taken_out_of_the_side_path():
    side_path = dict(rank=8, trunk_compute='bf16', trunk_chunk=None)
    options = TrunkOptions.take_from(side_path)
    assert side_path == dict(rank=8)
    assert options == TrunkOptions(compute='bf16', chunk=None)


def test_without_any_nothing_changes_but_the_memory():
    options = TrunkOptions.take_from({})
    assert (options.compute, options.weights) == (None, None)
    assert (options.compile, options.drop_path) == (False, 0)
    assert options.chunk > 0


@pytest.mark.parametrize(
    'name, values',
    [
        ('compute', ['fp32', 'bf16', 'fp16', None]),
        ('weights', ['fp32', 'bf16', 'fp16', 'int8', None]),
        ('chunk', [1, 10**9, None]),
        ('compile', [True, False]),
        ('drop_path', [0, 0.3, 0.99]),
    ],
)
def test_values_that_are_accepted(name, values):
    for value in values:
        options = TrunkOptions.take_from({f'trunk_{name}': value})
        assert getattr(options, name) == value


@pytest.mark.parametrize(
    'name, value, wanted',
    [
        ('compute', 'int8', "(None, 'fp32', 'bf16', 'fp16')"),
        ('compute', torch.bfloat16, "(None, 'fp32', 'bf16', 'fp16')"),
        ('compute', ['bf16'], "(None, 'fp32', 'bf16', 'fp16')"),
        ('weights', 'int4', "(None, 'fp32', 'bf16', 'fp16', 'int8')"),
        ('compile', 'yes', '(False, True)'),
        ('chunk', 0, 'a number of tokens above zero, or None'),
        ('chunk', -1, 'a number of tokens above zero, or None'),
        ('chunk', 0.5, 'a number of tokens above zero, or None'),
        ('chunk', '64', 'a number of tokens above zero, or None'),
        ('drop_path', 1, 'in [0, 1)'),
        ('drop_path', -0.1, 'in [0, 1)'),
        ('drop_path', float('nan'), 'in [0, 1)'),
        ('drop_path', '0.1', 'in [0, 1)'),
        ('drop_path', None, 'in [0, 1)'),
    ],
)
def test_values_that_are_refused(name, value, wanted):
    with pytest.raises(ConfigError) as error:
        TrunkOptions.take_from({f'trunk_{name}': value})
    text = str(error.value)
    assert text.startswith(f'`side_path.trunk_{name}` should be ')
    assert wanted in text
    assert text.endswith(f'but got {value!r}.')


def test_an_unknown_option_is_named_beside_those_there_are():
    with pytest.raises(ConfigError) as error:
        TrunkOptions.take_from(dict(trunk_compute='bf16', trunk_dtype='bf16'))
    assert str(error.value) == (
        '`side_path.trunk_dtype` is no option of the trunk. Options are '
        'trunk_compute, trunk_weights, trunk_chunk, trunk_compile, '
        'trunk_drop_path.'
    )


def test_the_type_asked_for_comes_before_autocast_and_weights():
    weight = torch.zeros(1, dtype=torch.float16)
    assert TrunkOptions().dtype(weight) is torch.float16
    with torch.autocast('cpu', torch.bfloat16):
        assert TrunkOptions().dtype(weight) is torch.bfloat16
        options = TrunkOptions(compute='fp32')
        assert options.dtype(weight) is torch.float32
    for name, dtype in (('bf16', torch.bfloat16), ('fp16', torch.float16)):
        assert TrunkOptions(compute=name).dtype(weight) is dtype


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_seen_and_switched_off(dtype):
    x = torch.randn(2, 2)
    assert autocast_dtype(x) is None
    with torch.autocast('cpu', dtype):
        assert autocast_dtype(x) is dtype
        with autocast_off(x):
            assert autocast_dtype(x) is None
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is dtype


@pytest.mark.parametrize('dtype', [torch.bfloat16, None])
def test_autocast_is_seen_by_older_torch(dtype, monkeypatch):
    """Below 2.4 there is one function for each device."""
    monkeypatch.delattr(torch, 'get_autocast_dtype', raising=False)
    monkeypatch.setattr(
        torch, 'is_autocast_cpu_enabled', lambda: dtype is not None
    )
    monkeypatch.setattr(torch, 'get_autocast_cpu_dtype', lambda: dtype)
    assert autocast_dtype(torch.zeros(1)) is dtype
