"""An average of what trains; the trunk is neither copied nor touched."""

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn

from e3va_mm.engine.hooks import TrainableEMAHook
from e3va_mm.engine.hooks.trainable_ema_hook import _part
from tests.helpers import build_e3va
from tests.test_engine.test_hooks.interrupted import (
    differing,
    run,
    weights,
)
from tests.test_engine.test_hooks.toy import VALIDATION, toy_config


@pytest.fixture
def config():
    return toy_config(
        **VALIDATION, **{'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4}
    )


def with_average(config, work, kind='e3va_mm.TrainableEMAHook', **options):
    hooks = options.pop('more', [])
    hook = dict(type=kind, momentum=0.3, **options.pop('hook', {}))
    return run(config, work, custom_hooks=[hook, *hooks], **options)


def hook_of(runner):
    (hook,) = (h for h in runner.hooks if isinstance(h, EMAHook))
    return hook


def saved(work, name='iter_4.pth'):
    return torch.load(work / name, weights_only=False)


@pytest.mark.parametrize(
    'hook',
    [
        dict(begin_iter=2),
        dict(update_buffers=True, interval=2),
        dict(ema_type='ExponentialMovingAverage', update_buffers=True),
        dict(ema_type='StochasticWeightAverage'),
    ],
)
def test_the_average_is_that_of_mmengine(config, tmp_path, hook):
    if 'ema_type' in hook and 'Stochastic' in hook['ema_type']:
        hook = {**hook, 'momentum': None}
    runs = {}
    for kind in ('EMAHook', 'e3va_mm.TrainableEMAHook'):
        options = {'type': kind, 'momentum': 0.3, **hook}
        if options['momentum'] is None:
            del options['momentum']
        work = tmp_path / kind
        runs[kind] = run(config, work, custom_hooks=[options]), saved(work)
    (_, stock), (runner, ours) = runs.values()
    # What the file gives to tests: the average, as a whole model.
    assert not differing(stock['state_dict'], ours['state_dict'])
    metrics = [
        r.message_hub.get_scalar('val/mean').current()
        for r, _ in runs.values()
    ]
    assert metrics[0] == metrics[1]
    assert not differing(*(weights(r) for r, _ in runs.values()))
    average = ours['ema_state_dict']
    assert average.keys() < stock['ema_state_dict'].keys()
    for key, value in average.items():
        assert torch.equal(value, stock['ema_state_dict'][key]), key


def test_the_trunk_is_in_no_copy(config, tmp_path):
    runner = with_average(
        config, tmp_path / 'run', hook=dict(update_buffers=True)
    )
    average = hook_of(runner).ema_model
    trained = {
        name for name, p in runner.model.named_parameters() if p.requires_grad
    }
    assert {n for n, _ in average.module.named_parameters()} == trained
    found = {name for name, _ in average.module.named_buffers()}
    assert found == {name for name, _ in runner.model.named_buffers()}
    state = saved(tmp_path / 'run')['ema_state_dict']
    assert not any('trunk' in name for name in state)


def test_validation_sees_the_average_and_training_does_not(
    config, tmp_path, monkeypatch
):
    key = 'head.weight'
    seen = []
    before, after = (
        TrainableEMAHook.before_val_epoch,
        TrainableEMAHook.after_val_epoch,
    )

    def look(function):
        def looking(self, runner, *args, **kwargs):
            seen.append(weights(runner)[key])
            function(self, runner, *args, **kwargs)
            seen.append(weights(runner)[key])

        return looking

    monkeypatch.setattr(TrainableEMAHook, 'before_val_epoch', look(before))
    monkeypatch.setattr(TrainableEMAHook, 'after_val_epoch', look(after))
    with_average(config, tmp_path / 'run')
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], saved(tmp_path / 'run')['state_dict'][key])


@pytest.mark.parametrize('first', ['EMAHook', 'e3va_mm.TrainableEMAHook'])
def test_the_average_goes_on(config, tmp_path, first):
    """Also from a checkpoint of mmengine's own hook."""
    work = tmp_path / 'run'
    with_average(config, work, first, stop=2)
    before = saved(work, 'iter_2.pth')
    seen = {}

    class Look(TrainableEMAHook):
        def before_train(self, runner):
            super().before_train(runner)
            seen.update(self.ema_model.state_dict())
            seen.update({f'now.{k}': v for k, v in weights(runner).items()})
            seen.update({k: v.clone() for k, v in seen.items()})

    run(
        config,
        work,
        resume=True,
        custom_hooks=[dict(type=Look, momentum=0.3)],
    )
    assert seen['steps'] == 2
    # mmengine keeps the average in the place of the weights.
    key = 'head.weight'
    assert torch.equal(seen[f'module.{key}'], before['state_dict'][key])
    assert torch.equal(
        seen[f'now.{key}'], before['ema_state_dict'][f'module.{key}']
    )
    assert saved(work)['ema_state_dict']['steps'] == 4


def test_a_resume_without_an_average_begins_one(config, tmp_path, capfd):
    work = tmp_path / 'run'
    run(config, work, stop=2)
    with_average(config, work, resume=True)
    assert 'it starts from the weights' in ''.join(capfd.readouterr())
    assert saved(work)['ema_state_dict']['steps'] == 2


def test_tests_take_what_is_loaded(config, tmp_path):
    """Whatever a file leaves out: here, all that is averaged."""
    work = tmp_path / 'run'
    with_average(config, work)
    for name in ('iter_4.pth', None):
        option = dict(load_from=name and str(work / name))
        runner = with_average(
            config, tmp_path / 'test', **option, **{'train_cfg.max_iters': 0}
        )
        before = weights(runner)
        hook_of(runner)._swap_ema_parameters()
        assert not differing(before, weights(runner))


def test_tensors_that_a_model_shares():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_e3va()
            self.first = nn.Linear(2, 2)
            self.second = nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.register_buffer('count', torch.zeros(1))
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    model = Model()
    part = _part(model, True)
    assert part.first.weight is part.second.weight is model.first.weight
    assert 'frozen' not in part.state_dict()
