"""Options of a frozen trunk, and the type that follows from them."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.temporaries import GPU_BYTES
from e3va_mm.trunks import TrunkOptions

COMPUTE = "one of (None, 'fp32', 'bf16', 'fp16')"
WEIGHTS = "one of (None, 'fp32', 'bf16', 'fp16', 'int8')"
CHUNK = 'a whole number from 1 on, or None'
DROP_PATH = 'a number from 0 below 1'


def test_by_default_nothing_changes_but_the_memory():
    options = TrunkOptions.of({})
    assert (options.compute, options.weights) == (None, None)
    assert (options.compile, options.drop_path) == (False, 0)
    assert options.chunk is None


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
        assert getattr(TrunkOptions.of({name: value}), name) == value


@pytest.mark.parametrize(
    'name, value, wanted',
    [
        ('compute', 'int8', COMPUTE),
        ('compute', torch.bfloat16, COMPUTE),
        ('compute', ['bf16'], COMPUTE),
        ('weights', 'int4', WEIGHTS),
        ('compile', 'yes', 'True or False'),
        ('chunk', 0, CHUNK),
        ('chunk', 0.5, CHUNK),
        ('chunk', '64', CHUNK),
        ('drop_path', 1, DROP_PATH),
        ('drop_path', -0.1, DROP_PATH),
        ('drop_path', float('nan'), DROP_PATH),
        ('drop_path', None, DROP_PATH),
    ],
)
def test_values_that_are_refused(name, value, wanted):
    with pytest.raises(ConfigError) as error:
        TrunkOptions.of({name: value})
    assert str(error.value) == (
        f'`tuner.trunk_{name}` should be {wanted}, but got {value!r}.'
    )


def test_an_unknown_option_is_named_beside_those_there_are():
    with pytest.raises(ConfigError) as error:
        TrunkOptions.of(dict(compute='bf16', dtype='bf16'))
    assert str(error.value) == (
        '`tuner.trunk_dtype` is unknown. Options are trunk_compute, '
        'trunk_weights, trunk_chunk, trunk_compile, trunk_drop_path.'
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


def test_how_many_tokens_at_once_depends_on_the_device():
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    assert TrunkOptions().at_once(2**20, cpu) == 8192
    assert TrunkOptions().at_once(2**20, gpu) == GPU_BYTES // 2**20
    assert TrunkOptions().at_once(2**40, gpu) == 1
    for device in (cpu, gpu):
        assert TrunkOptions(chunk=7).at_once(2**20, device) == 7
