import json
import statistics
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner

from e3va_mm.errors import ConfigError
from e3va_mm.measure import hook as measure_hook
from e3va_mm.measure.hook import MeasureHook
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)

MIB = 2**20
CATEGORIES = ('weights', 'gradients', 'optimizer', 'kept', 'temporaries')
ADAM = dict(type='AdamW', lr=1e-3)


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
        self.wrapped, self.scalars = [], []

    def after_train_iter(self, runner, batch_idx, **kwargs):
        self.wrapped.append('train_step' in vars(runner.model))
        scalars = runner.message_hub.log_scalars
        self.scalars.append([k for k in scalars if 'measured' in k])


def build(folder, count=16, hook=None, wrapper=None, **options):
    """A runner of a detector, two pictures an iteration."""
    make_coco(folder, 'train', count=count)
    return _runner(detection_config, folder, hook, wrapper or {}, options)


def build_segmentor(folder, hook, wrapper):
    make_segmentation(folder)
    loop = dict(type='IterBasedTrainLoop', max_iters=6)
    options = dict(train_cfg=loop)
    return _runner(segmentation_config, folder, hook, wrapper, options)


def _runner(write_config, folder, hook, wrapper, options):
    hooks = [dict(type='WatchHook')]
    if hook is not None:
        hooks.insert(0, dict(type='e3va_mm.MeasureHook', **hook))
    path = write_config(
        folder,
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
        custom_hooks=hooks,
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': ADAM, **wrapper},
        randomness=dict(seed=0),
        **options,
    )
    config = Config.fromfile(path)
    # Visualizers of one name are one, and write to one place.
    config.visualizer.name = str(folder)
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
    """The records of the JSON log."""
    (path,) = Path(runner.work_dir).glob('*/vis_data/2*.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(records):
    """Iteration to what stands there under ``measured_``."""
    prefix = 'measured_'
    return {
        record['step']: {
            key[len(prefix) :]: value
            for key, value in record.items()
            if key.startswith(prefix)
        }
        for record in records
        if any(key.startswith(prefix) for key in record)
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
    found = measured(records_of(runner))
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
    assert f'{trainable:,} of {figures["total"]:,} parameters train, ' in log
    assert log.count('Measured in iteration 4, MiB') == 1
    assert f'peak {figures["peak"] / MIB:,.1f}' in log
    assert log.count('Measured over 3 iterations') == 1


def test_it_leaves_nothing_behind(tmp_path):
    runner = train(tmp_path, hook=dict(at=1, timed=2))
    watch = hook_of(runner, WatchHook)
    # Accounted is the second iteration, timed are the third and fourth.
    assert watch.wrapped == [True] * 3 + [False] * 5
    assert watch.scalars == [[]] * 8
    assert 'train_step' not in vars(runner.model)


def test_a_train_step_of_the_model_itself_is_given_back(tmp_path):
    runner = build(tmp_path, hook=dict(at=1, timed=1))
    step = runner.model.train_step
    runner.model.train_step = own = lambda *a, **k: step(*a, **k)
    runner.train()
    assert vars(runner.model)['train_step'] is own
    assert 'seconds' in hook_of(runner).figures


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('counts', [1, 2])
def test_results_do_not_change(tmp_path, amp, counts):
    wrapper = dict(accumulative_counts=counts, clip_grad=dict(max_norm=1.0))
    if amp:  # mmcv's RoIAlign on CPU has no 16 bits: a segmentor
        make, wrapper['type'] = build_segmentor, 'CpuAmpOptimWrapper'
    else:
        make = build
    runners = [
        make(tmp_path / name, hook=hook, wrapper=wrapper)
        for name, hook in (('a', None), ('b', dict(at=2, timed=1)))
    ]
    for runner in runners:
        torch.manual_seed(0)
        runner.train()
    without, runner = runners
    figures = hook_of(runner).figures
    assert len(figures['seconds']) == 1 and 'peak' in figures
    losses = [[r['loss'] for r in records_of(made)] for made in runners]
    assert len(losses[0]) >= 4 and losses[0] == losses[1]
    state = runner.model.state_dict()
    for name, value in without.model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_cuda_the_allocator_stands_beside_it(tmp_path):
    wrapper = dict(type='AmpOptimWrapper')
    runner = build_segmentor(tmp_path, dict(at=1, timed=1), wrapper)
    runner.train()
    figures = hook_of(runner).figures
    assert figures['reserved'] >= figures['allocated'] >= figures['peak']
    found = measured(records_of(runner))[2]
    assert found['reserved_mib'] == figures['reserved'] / MIB
    assert len(figures['seconds']) == 1


@pytest.mark.parametrize('at, expected', [(0, 6), (3, 6), (5, 6), (6, 9)])
def test_with_accumulation_the_iteration_has_all_there_is(
    tmp_path, at, expected
):
    """It ends with an update, gradients and a state are there before."""
    runner = train(
        tmp_path,
        count=20,
        wrapper=dict(accumulative_counts=3),
        hook=dict(at=at, timed=1),
    )
    figures = hook_of(runner).figures
    assert figures['optimizer'] > 4 * figures['trainable']
    assert figures['gradients'] == 4 * figures['trainable']
    assert f'Measured in iteration {expected}, ' in log_of(runner)


def test_records_are_those_of_the_logger(tmp_path):
    """Scalars wait for the next record, and stand in that alone."""
    runner = train(
        tmp_path,
        hook=dict(at=1, timed=1),
        default_hooks=dict(logger=dict(interval=4)),
    )
    found = measured(records_of(runner))
    assert list(found) == [4]
    assert {'peak_mib', 'seconds'} <= set(found[4])
    assert len(records_of(runner)) == 2
    # Where an epoch is shorter than the interval, its end makes a record.
    runner = train(
        tmp_path / 'short',
        count=6,
        hook=dict(at=1, timed=1),
        default_hooks=dict(logger=dict(interval=50)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
    )
    assert [r['step'] for r in records_of(runner)] == [3, 6, 9]
    assert list(measured(records_of(runner))) == [3]


def test_a_training_that_ends_early_says_what_it_has(tmp_path):
    runner = train(tmp_path / 'a', count=8, hook=dict(at=3, timed=50))
    assert 'peak' in hook_of(runner).figures
    assert 'Measured over' not in log_of(runner)
    assert 'train_step' not in vars(runner.model)
    runner = train(tmp_path / 'b', count=12, hook=dict(at=3, timed=50))
    assert 'Measured over 2 iterations' in log_of(runner)
    runner = train(tmp_path / 'c', count=6, hook=dict(at=3))
    assert 'measured nothing: the training ended before iteration 4' in (
        log_of(runner)
    )
    assert 'train_step' not in vars(runner.model)


def test_loops_by_iteration(tmp_path):
    runner = build_segmentor(tmp_path, dict(at=1, timed=1), {})
    runner.train()
    assert list(measured(records_of(runner))) == [2, 3]


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
