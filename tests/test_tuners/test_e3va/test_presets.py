"""What a preset stands for."""

import copy
import sys

import pytest
from mmengine import ConfigDict

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import TrunkOptions
from e3va_mm.tuners.e3va.presets import PRESETS, resolve_preset
from tests.helpers import build_e3va

LEAN = dict(save_taps=('recompute', 'int4'), compute='bf16')


@pytest.mark.parametrize(
    'tuner, plain, expected, options',
    [
        (dict(), False, {}, {}),
        (dict(preset='exact', rank=8), False, dict(rank=8), {}),
        (
            dict(preset='lean'),
            False,
            LEAN,
            dict(compute='bf16', weights='bf16'),
        ),
        (
            dict(preset='lean'),
            True,  # no stage is cheaper to run again
            dict(LEAN, save_taps='int8'),
            dict(compute='bf16', weights='bf16'),
        ),
        (
            ConfigDict(
                preset='lean',
                rank=8,
                save_taps='bf16',
                trunk_compute='fp16',
                trunk_weights=None,
                trunk_chunk=64,
            ),
            False,
            dict(rank=8, save_taps='bf16', compute='bf16'),
            dict(compute='fp16', weights=None, chunk=64),
        ),
        (
            dict(preset='lean', trunk_drop_path=0.2),
            False,  # the preset can do without running the trunk twice
            dict(LEAN, save_taps='int4'),
            dict(compute='bf16', weights='bf16', drop_path=0.2),
        ),
    ],
)
def test_own_options_come_before_those_of_the_preset(
    tuner, plain, expected, options
):
    before = copy.deepcopy((tuner, PRESETS))
    found = resolve_preset(tuner, plain)
    assert found == (expected, TrunkOptions(**options))
    assert (tuner, PRESETS) == before  # a config is used again


@pytest.mark.parametrize('preset', ['', None, 8, ['lean']])
def test_unknown_presets_are_refused(preset):
    with pytest.raises(ConfigError) as error:
        resolve_preset(dict(preset=preset))
    assert str(error.value) == (
        "`tuner.preset` should be one of ('exact', 'lean'), but got "
        f'{preset!r}.'
    )


def test_a_random_trunk_cannot_run_twice():
    tuner = dict(save_taps='recompute', trunk_drop_path=0.2)
    with pytest.raises(ConfigError) as error:
        build_e3va(tuner=tuner)
    text = str(error.value)
    assert "`tuner.save_taps='recompute'` runs the trunk twice" in text
    assert '`tuner.trunk_drop_path` is 0.2' in text
    assert 'leave out the drop path' in text
    build_e3va(tuner=dict(tuner, trunk_drop_path=0.0))


def test_a_missing_torchao_is_said_when_the_model_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    build_e3va(tuner=dict(preset='lean'))
    with pytest.raises(ConfigError, match='`pip install torchao`'):
        build_e3va(tuner=dict(preset='lean', trunk_weights='int8'))
