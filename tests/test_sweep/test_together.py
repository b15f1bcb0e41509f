"""Runs that train together, and the same runs alone."""

from contextlib import nullcontext

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.sweep import turns_of
from e3va_mm.sweep.shared_step import Run
from e3va_mm.weights import read_adapter, read_checkpoint
from tests.helpers import Detector, build_e3va
from tests.test_sweep import runs as tiny

LR = 'optim_wrapper.optimizer.lr'
SEED = 'randomness.seed'
TUNER = 'model.backbone.tuner'
INIT = 'model.backbone.init_cfg'


@pytest.mark.parametrize('kind', ['detection', 'segmentation'])
def test_each_run_gives_what_it_gives_alone(kind, tmp_path, monkeypatch):
    path = getattr(tiny, kind)(tmp_path, steps=20, n=20, val=20)
    options = dict(
        a={LR: 1e-3},
        b={LR: 1e-2, SEED: 1, TUNER: dict(type='E3VAMix', rank=4)},
    )
    configs = tiny.runs(path, tmp_path / 'together', **options)
    losses, batches, ended = tiny.trained(configs, monkeypatch)
    assert ended == {}
    assert losses['a'] != losses['b']
    apart = tiny.runs(path, tmp_path / 'apart', **options)
    for name, config in apart.items():
        # What a check of data looks for, a list of batches has not.
        config.custom_hooks = config.custom_hooks[:-1]
        expected = tiny.alone(config, batches)
        assert len(expected) == 20
        assert losses[name] == pytest.approx(expected, rel=1e-5)
        assert_same_files(tmp_path / 'together' / name, config.work_dir)


def assert_same_files(folder, expected):
    found, wanted = (
        read_checkpoint(f'{each}/iter_20.pth') for each in (folder, expected)
    )
    weights, others = found['state_dict'], wanted['state_dict']
    torch.testing.assert_close(dict(weights), dict(others))
    assert found['optimizer'].keys() == wanted['optimizer'].keys()
    assert found['param_schedulers'] == wanted['param_schedulers']
    found, wanted = (
        read_adapter(f'{each}/adapter_iter_20.safetensors')
        for each in (folder, expected)
    )
    torch.testing.assert_close(found.tensors, wanted.tensors)
    fingerprints = [
        each.trunks['backbone.'].fingerprint for each in (found, wanted)
    ]
    assert len(set(fingerprints)) == 1


def test_a_run_that_diverges_leaves_the_others(tmp_path):
    path = tiny.segmentation(tmp_path)
    options = dict(a={LR: 1e30}, b={LR: 1e-3}, c={LR: 1e-3, SEED: 1})
    losses, _, ended = tiny.trained(tiny.runs(path, tmp_path, **options))
    assert ended.keys() == {'a'} and 'is not finite' in ended['a']
    assert len(losses['a']) < 4
    assert len(losses['b']) == len(losses['c']) == 4
    assert (tmp_path / 'b' / 'iter_4.pth').exists()
    assert not (tmp_path / 'a' / 'iter_4.pth').exists()
    again, _, _ = tiny.trained(
        tiny.runs(path, tmp_path / 'alone', b=options['b'])
    )
    assert again['b'] == losses['b']


def test_without_a_guard_a_run_ends_too(tmp_path):
    path = tiny.segmentation(tmp_path, more='custom_hooks = []\n')
    configs = tiny.runs(path, tmp_path, a={LR: 1e30})
    _, _, ended = tiny.trained(configs)
    assert 'loss is' in ended['a']


def test_an_interruption_is_resumed(tmp_path):
    path = tiny.segmentation(tmp_path)
    options = dict(a={LR: 1e-3}, b={LR: 1e-2})
    seen = []

    def on_step(done, total, losses):
        seen.append((done, total, sorted(losses)))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.train_together(tiny.runs(path, tmp_path, **options), 0, on_step)
    configs = tiny.runs(path, tmp_path, **options, c={})
    # One that is new begins apart.
    assert turns_of(configs, 4) == [['a', 'b'], ['c']]
    assert turns_of(configs, 1) == [['a'], ['b'], ['c']]
    del configs['c']
    tiny.train_together(configs, 0, on_step)
    assert [done for done, *_ in seen] == [1, 2, 3, 3, 4]
    assert seen[-1] == (4, 4, ['a', 'b'])


@pytest.mark.parametrize(
    'options, text',
    [
        ({TUNER: dict(type='LoRA')}, 'b: expected a model with one backbone'),
        ({f'{TUNER}.trunk_drop_path': 0.1}, '`tuner.trunk_drop_path` is 0.1'),
        ({f'{TUNER}.trunk_compute': 'bf16'}, 'a and b: Expected two back'),
        ({INIT: None, 'model.backbone.allow_random_trunk': True}, 'init_cfg'),
    ],
)
def test_what_cannot_share_a_pass_is_refused(options, text, tmp_path):
    path = tiny.segmentation(tmp_path)
    configs = tiny.runs(path, tmp_path, a={}, b=options)
    with pytest.raises(ConfigError, match=text):
        tiny.train_together(configs, 0)


def test_a_model_with_a_step_of_its_own_is_refused():
    with pytest.raises(ConfigError, match='Detector has its own'):
        Run('a', Detector(build_e3va()), None, nullcontext)
