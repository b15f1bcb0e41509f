import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner

from e3va_mm.errors import ConfigError
from e3va_mm.measure import measure_hook
from e3va_mm.measure.measure_hook import MeasureHook
from tests.test_engine.test_hooks.toy import toy_config

MIB = 2**20
CATEGORIES = ('weights', 'gradients', 'optimizer', 'kept', 'temporaries')


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper wants a GPU."""

    def optim_context(self, model):
        return torch.autocast('cpu', torch.bfloat16)


@HOOKS.register_module()
class WatchHook(Hook):
    """Notes, at the end of each iteration, what MeasureHook leaves."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.wrapped = []

    def after_train_iter(self, runner, batch_idx, **kwargs):
        self.wrapped.append('train_step' in vars(runner.model))


def build(folder, iters=8, hook=None, **options):
    hooks = [dict(type='WatchHook')]
    if hook is not None:
        hooks.insert(0, dict(type='e3va_mm.MeasureHook', **hook))
    config = toy_config(
        custom_hooks=hooks, **{'train_cfg.max_iters': iters}, **options
    )
    config.work_dir = str(folder)
    config.default_hooks = dict(
        checkpoint=None, logger=dict(type='LoggerHook', interval=1)
    )
    # Visualizers of one name are one, and write to one place.
    config.visualizer = dict(
        type='Visualizer',
        name=str(folder),
        vis_backends=[dict(type='LocalVisBackend')],
    )
    config.experiment_name = f'measure{time.monotonic_ns()}'
    return Runner.from_cfg(config)


def train(*args, **kwargs):
    """The runner, after its training."""
    runner = build(*args, **kwargs)
    runner.train()
    return runner


def hook_of(runner, kind=MeasureHook):
    (hook,) = (h for h in runner.hooks if isinstance(h, kind))
    return hook


def log_of(runner):
    (path,) = Path(runner.work_dir).glob('*/*.log')
    return path.read_text()


def records_of(runner):
    """The records of the visualizer."""
    (path,) = Path(runner.work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(runner):
    """Iteration to what stands there under ``measured_``."""
    return {
        record['step']: {
            key.removeprefix('measured_'): value
            for key, value in record.items()
            if key.startswith('measured_')
        }
        for record in records_of(runner)
        if any(key.startswith('measured_') for key in record)
    }


def test_figures_are_those_of_the_model_and_stand_once_in_the_log(tmp_path):
    runner = train(tmp_path, hook=dict(at=3, timed=3))
    figures = hook_of(runner).figures
    model = runner.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert figures['trainable'] == trainable
    assert figures['total'] == sum(p.numel() for p in model.parameters())
    assert figures['peak'] == sum(figures[key] for key in CATEGORIES)
    tensors = [*model.parameters(), *model.buffers()]
    assert figures['weights'] == sum(t.nbytes for t in tensors)
    state = [
        value
        for entry in runner.optim_wrapper.optimizer.state.values()
        for value in entry.values()
    ]
    assert figures['optimizer'] == sum(t.nbytes for t in state)
    assert figures['kept'] + figures['temporaries'] > 0
    assert len(figures['seconds']) == 3 and min(figures['seconds']) > 0

    # The fourth iteration is accounted, the three after it are timed.
    found = measured(runner)
    assert list(found) == [4, 7]
    assert found[4]['trainable'] == trainable
    for key in ('peak', *CATEGORIES):
        assert found[4][f'{key}_mib'] == pytest.approx(figures[key] / MIB)
    assert found[7] == dict(
        seconds=pytest.approx(statistics.median(figures['seconds'])),
        seconds_min=pytest.approx(min(figures['seconds'])),
        seconds_max=pytest.approx(max(figures['seconds'])),
    )
    log = log_of(runner)
    assert f'{trainable:,} of {figures["total"]:,} parameters train' in log
    assert log.count('Measured in iteration 4, MiB') == 1
    assert f'peak {figures["peak"] / MIB:,.1f}' in log
    assert log.count('Measured over 3 iterations') == 1


def test_it_leaves_nothing_behind(tmp_path):
    runner = train(tmp_path, hook=dict(at=1, timed=2))
    watch = hook_of(runner, WatchHook)
    # Accounted is the second iteration, timed are the third and fourth.
    assert watch.wrapped == [True] * 3 + [False] * 5
    assert 'train_step' not in vars(runner.model)


def test_a_train_step_of_the_model_itself_is_given_back(tmp_path):
    runner = build(tmp_path, hook=dict(at=1, timed=1))
    step = runner.model.train_step
    runner.model.train_step = own = lambda *a, **k: step(*a, **k)
    runner.train()
    assert vars(runner.model)['train_step'] is own
    assert 'seconds' in hook_of(runner).figures


@pytest.mark.parametrize('kind', ['OptimWrapper', 'CpuAmpOptimWrapper'])
@pytest.mark.parametrize('counts', [1, 2])
def test_results_do_not_change(tmp_path, kind, counts):
    options = {
        'optim_wrapper.type': kind,
        'optim_wrapper.accumulative_counts': counts,
        'optim_wrapper.clip_grad': dict(max_norm=1.0),
    }
    runners = [
        train(tmp_path / name, hook=hook, **options)
        for name, hook in (('a', None), ('b', dict(at=2, timed=1)))
    ]
    without, runner = runners
    figures = hook_of(runner).figures
    assert len(figures['seconds']) == 1 and 'peak' in figures
    losses = [
        [record['loss'] for record in records_of(made) if 'loss' in record]
        for made in runners
    ]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    state = runner.model.state_dict()
    for name, value in without.model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_cuda_the_allocator_stands_beside_it(tmp_path):
    runner = train(tmp_path, hook=dict(at=1, timed=1))
    figures = hook_of(runner).figures
    assert figures['reserved'] >= figures['allocated'] >= figures['peak']
    found = measured(runner)[2]
    assert found['reserved_mib'] == figures['reserved'] / MIB
    assert len(figures['seconds']) == 1


@pytest.mark.parametrize('at, expected', [(0, 6), (5, 6), (6, 9)])
def test_with_accumulation_the_iteration_has_all_there_is(
    tmp_path, at, expected
):
    """It ends with an update, gradients and a state are there before."""
    counts = {'optim_wrapper.accumulative_counts': 3}
    runner = train(tmp_path, 10, dict(at=at, timed=1), **counts)
    figures = hook_of(runner).figures
    assert figures['optimizer'] > 4 * figures['trainable']
    assert figures['gradients'] == 4 * figures['trainable']
    assert f'Measured in iteration {expected}, ' in log_of(runner)


def test_a_training_that_ends_early_says_what_it_has(tmp_path):
    runner = train(tmp_path / 'a', 4, dict(at=3, timed=50))
    assert 'peak' in hook_of(runner).figures
    assert 'Measured over' not in log_of(runner)
    assert 'train_step' not in vars(runner.model)
    runner = train(tmp_path / 'b', 6, dict(at=3, timed=50))
    assert 'Measured over 2 iterations' in log_of(runner)
    runner = train(tmp_path / 'c', 3, dict(at=3))
    assert 'measured nothing: the training ended before iteration 4' in (
        log_of(runner)
    )
    assert 'train_step' not in vars(runner.model)


def test_compiled_code_is_timed_and_not_accounted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda step, **kwargs: step)
    runner = train(tmp_path, hook=dict(at=1, timed=2), compile=True)
    figures = hook_of(runner).figures
    assert len(figures['seconds']) == 2
    assert 'peak' not in figures
    assert 'Measured in iteration' not in log_of(runner)


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_hook, 'is_main_process', lambda: False)
    runner = train(tmp_path, hook=dict(at=1, timed=1))
    assert hook_of(runner).figures == {}
    assert not any(hook_of(runner, WatchHook).wrapped)
    assert 'Measured' not in log_of(runner)


@pytest.mark.parametrize('options', [dict(at=-1), dict(timed=0)])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match='`at` of at least 0'):
        MeasureHook(**options)
