"""Runs with interruptions give the weights of runs without, bit for bit."""

import functools
import importlib
import json
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import RandomSampler

from e3va_mm.engine.hooks.exact_resume_hook import (
    _Batches,
    _Sample,
    _SeededDataset,
)
from e3va_mm.engine.seeds import seed_all
from e3va_mm.errors import CheckpointError, ConfigError
from tests.test_engine.test_hooks.interrupted import (
    differing,
    run,
    run_in_pieces,
    weights,
)
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    side_path_config,
)
from tests.test_engine.test_hooks.toy import ToyData, toy_config

HOOK = dict(type='e3va_mm.ExactResumeHook')


def config_with(*hooks, **options):
    return toy_config(custom_hooks=[HOOK, *hooks], **options)


@DATA_SAMPLERS.register_module()
class GlobalSampler(RandomSampler):
    """Draws from torch's global generator, pass after pass."""

    def __init__(self, dataset, seed, shuffle):
        super().__init__(dataset)


# 5 samples, 2 at a time: epochs of 3 iterations.
SHUFFLED = {'train_dataloader.sampler.type': 'DefaultSampler'}
EPOCHS = {
    **SHUFFLED,
    'train_cfg': dict(by_epoch=True, max_epochs=3),
}
WORKERS = {
    'train_dataloader.num_workers': 2,
    'train_dataloader.persistent_workers': True,
}
ACCUMULATION = {
    'optim_wrapper.accumulative_counts': 3,
    'optim_wrapper.clip_grad': dict(max_norm=0.1),
}
AMP = {
    'optim_wrapper.type': 'AmpOptimWrapper',
    'optim_wrapper.dtype': 'bfloat16',
    # Grows after 2, 4 and 6 updates.
    'optim_wrapper.loss_scale': dict(init_scale=1024.0, growth_interval=2),
}
CASES = {
    'iterations': ({}, (1, 5)),
    'iterations, with a worker': (
        {'train_dataloader.num_workers': 1},
        (2, 5),
    ),
    # Where an update is due after 3, 6 and 7.
    'accumulation': (ACCUMULATION, (1, 2, 3)),
    'passes over a finite sampler': (SHUFFLED, (2, 3, 5)),
    'passes, with workers': ({**SHUFFLED, **WORKERS}, (2, 3)),
    'a sampler without a seed': (
        {'train_dataloader.sampler.type': 'GlobalSampler'},
        (2, 4),
    ),
    'amp': (AMP, (3,)),
    'inside epochs': (EPOCHS, (3, 8)),
    'ends of epochs': (
        {**EPOCHS, 'default_hooks.checkpoint.by_epoch': True},
        (4, 8),
    ),
    # The third iteration is an epoch's last.
    'epochs, with workers': ({**EPOCHS, **WORKERS}, (2, 3)),
    'epochs, accumulation': ({**EPOCHS, **ACCUMULATION}, (2, 5)),
}


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """mmengine's own wrapper, which asks for a GPU."""
    name = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    module = importlib.import_module(name)
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    scaler = functools.partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(module, 'GradScaler', scaler)


@pytest.mark.parametrize('case', CASES)
def test_the_weights_are_those_of_one_run(tmp_path, case, amp_on_cpu):
    options, stops = CASES[case]
    config = config_with(**options)
    whole = run(config, tmp_path / 'whole')
    pieces = run_in_pieces(config, tmp_path / 'pieces', stops)
    assert pieces.iter == whole.iter
    assert not differing(weights(whole), weights(pieces))
    one, other = (r.optim_wrapper.state_dict() for r in (whole, pieces))
    assert one['state'].keys() == other['state'].keys()
    for key, state in one['state'].items():
        assert not differing(state, other['state'][key])
    assert one['param_groups'] == other['param_groups']
    if case == 'amp':
        assert one['loss_scaler'] == other['loss_scaler']
        assert one['loss_scaler']['scale'] == 8 * 1024


def test_without_the_hook_it_is_another_run(tmp_path):
    config = toy_config()
    whole = run(config, tmp_path / 'whole')
    pieces = run_in_pieces(config, tmp_path / 'pieces', (3,))
    assert differing(weights(whole), weights(pieces))


@pytest.mark.parametrize('average', ['EMAHook', 'e3va_mm.TrainableEMAHook'])
def test_averages_go_on(tmp_path, average):
    hook = dict(type=average, momentum=0.3, update_buffers=True)
    config = config_with(hook)
    run(config, tmp_path / 'whole')
    run_in_pieces(config, tmp_path / 'pieces', (2, 5))
    whole, pieces = (
        torch.load(tmp_path / name / 'iter_7.pth', weights_only=False)
        for name in ('whole', 'pieces')
    )
    for key in ('state_dict', 'ema_state_dict'):
        assert not differing(whole[key], pieces[key])
    assert whole['ema_state_dict']['steps'] == 7
    average = whole['state_dict']['head.weight']
    now = whole['ema_state_dict']['module.head.weight']
    assert not torch.equal(average, now)


def test_detector_with_batches_by_aspect_ratio(tmp_path):
    """Epochs, a wrapper of the data set, heads that draw their samples."""
    make_coco(tmp_path, 'train', 5)
    file = tmp_path / 'train.json'
    content = json.loads(file.read_text())
    for i, image in enumerate(content['images']):
        if i % 2:  # said to be upright: buckets of three and two
            image['height'], image['width'] = 64, 48
    file.write_text(json.dumps(content))
    config, *_ = side_path_config(
        tmp_path,
        detection_config(tmp_path),
        'neck=dict(in_channels=[32, 64, 128, 256])',
        f"""
randomness = dict(seed=3)
val_cfg = val_dataloader = val_evaluator = None
custom_hooks = [{HOOK}]
pipeline = _base_.train_dataloader.dataset.pipeline
pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
inner = dict(_base_.train_dataloader.dataset, pipeline=pipeline)
train_dataloader = dict(
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[inner]))
train_cfg = dict(max_epochs=2)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
""",
    )
    whole = run(config, tmp_path / 'whole')
    pieces = run_in_pieces(config, tmp_path / 'pieces', (4,))
    assert pieces.iter == whole.iter == 6
    assert not differing(weights(whole), weights(pieces))


def test_workers_do_not_matter(tmp_path):
    none = run(config_with(**EPOCHS), tmp_path / 'none')
    two = run(config_with(**EPOCHS, **WORKERS), tmp_path / 'two')
    assert not differing(weights(none), weights(two))


class SeenHook(Hook):
    """Writes down the numbers of iterations and the samples of each."""

    def before_train(self, runner):
        runner.seen = self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.seen.append((runner.epoch, batch_idx, data_batch['index']))


def test_an_epoch_goes_on_where_it_was(tmp_path, monkeypatch):
    config = config_with(dict(type=SeenHook), **EPOCHS)
    whole = run(config, tmp_path / 'whole').seen
    assert [each[:2] for each in whole] == [
        (epoch, i) for epoch in range(3) for i in range(3)
    ]
    first = run(config, tmp_path / 'pieces', stop=4).seen
    loaded = []
    real = ToyData.__getitem__

    def getitem(self, index):
        loaded.append(index)
        return real(self, index)

    monkeypatch.setattr(ToyData, '__getitem__', getitem)
    rest = run(config, tmp_path / 'pieces', resume=True).seen
    assert first + rest == whole
    # Nothing of what the epoch has had: four of two batches, five of the next.
    assert len(loaded) == sum(len(indices) for *_, indices in rest)


def test_what_hooks_set_reaches_the_data_set():
    class Data:
        pipeline = 'first'

        def __getitem__(self, index):
            return self.pipeline, index, random.random()

        def __getitems__(self, indices):
            raise AssertionError('samples are seeded one by one')

    inner = Data()
    data = _SeededDataset(inner)
    data.pipeline = 'second'
    assert inner.pipeline == 'second'
    assert not hasattr(data, '__getitems__')
    drawn = [data[_Sample(2, (0, 0, 7, place))] for place in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0][:2] == data[2][:2] == ('second', 2)
    again = pickle.loads(pickle.dumps(_SeededDataset([1, 2])))
    assert len(again) == 2


def test_no_seed_is_used_twice(monkeypatch):
    module = 'e3va_mm.engine.hooks.exact_resume_hook.seed_all'
    used = []
    monkeypatch.setattr(module, used.append)
    batches = _Batches([['a', 'b'], ['c']], (3, 0))
    samples = [sample for batch in batches for sample in batch]
    assert [sample.index for sample in samples] == ['a', 'b', 'c']
    assert len(used) == 3  # for two batches, and to find the end
    used += [sample.numbers for sample in samples]
    used += [(3, 0, i) for i in range(3)]  # of the iterations
    used += [(0, 1, 0), (1, 0, 0)]
    drawn = set()
    for numbers in used:
        seed_all(numbers)
        drawn |= {random.random(), np.random.rand(), torch.rand(1).item()}
    assert len(drawn) == 3 * len(used)


@LOOPS.register_module()
class PassesLoop(IterBasedTrainLoop):
    pass


class TwoOptimizersHook(Hook):
    def before_run(self, runner):
        wrapper = runner.optim_wrapper
        runner.optim_wrapper = OptimWrapperDict(one=wrapper, other=wrapper)


REFUSED = {
    'a seed. Set `randomness=dict(seed=0)`': dict(randomness=dict(seed=None)),
    'a config without EarlyStoppingHook, ReduceOnPlateauLR, ': dict(
        param_scheduler=[dict(type='ReduceOnPlateauLR', monitor='loss')],
        custom_hooks=[HOOK, dict(type='EarlyStoppingHook', monitor='mIoU')],
    ),
    'a config without CachedMosaic, ': dict(
        pipeline=[dict(transforms=[dict(type='mmdet.CachedMosaic')])]
    ),
    'a config without FixedViews, ': {
        'train_dataloader.dataset': dict(
            _delete_=True,
            type='e3va_mm.FixedViews',
            dataset=dict(type='ToyData'),
        )
    },
    'IterBasedTrainLoop, but got `train_cfg.type=PassesLoop`': dict(
        train_cfg=dict(type='PassesLoop', max_iters=7)
    ),
    'one optimizer, but `optim_wrapper` has several': dict(
        param_scheduler=None,
        custom_hooks=[HOOK, dict(type=TwoOptimizersHook)],
    ),
}


@pytest.mark.parametrize('need', REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path, need):
    config = toy_config(**{'custom_hooks': [HOOK], **REFUSED[need]})
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / 'work')
    assert need in str(error.value)
    assert 'Without the hook all is as in mmengine' in str(error.value)
    assert not list((tmp_path / 'work').glob('*.pth'))


@pytest.mark.parametrize(
    'options, change',
    [
        ({'randomness.seed': 4}, 'seed 3, now 4'),
        ({'train_dataloader.batch_size': 1}, 'batch_size 2, now 1'),
        ({'train_dataloader.dataset.count': 4}, 'samples 5, now 4'),
        (
            {'optim_wrapper.accumulative_counts': 2},
            'accumulative_counts 1, now 2',
        ),
        (
            {'train_dataloader.sampler.type': 'DefaultSampler'},
            "sampler 'InfiniteSampler', now 'DefaultSampler'",
        ),
    ],
)
def test_another_run_is_refused(tmp_path, options, change):
    config = config_with()
    run(config, tmp_path / 'work', stop=1)
    with pytest.raises(CheckpointError) as error:
        run(config, tmp_path / 'work', resume=True, **options)
    text = str(error.value)
    assert f'it was written with {change}' in text
    assert 'Set these as they were, or leave ExactResumeHook out' in text


def test_a_checkpoint_without_the_hook_is_refused(tmp_path):
    run(toy_config(), tmp_path / 'work', stop=1)
    with pytest.raises(CheckpointError, match='written without ExactResumeH'):
        run(config_with(), tmp_path / 'work', resume=True)


def test_gradients_of_several_processes_are_not_there(tmp_path, monkeypatch):
    config = config_with(**ACCUMULATION)
    monkeypatch.setattr(Runner, 'world_size', 2)
    run(config, tmp_path / 'work', stop=2)
    with pytest.raises(CheckpointError) as error:
        run(config, tmp_path / 'work', resume=True)
    text = str(error.value)
    assert 'between two updates of the weights by several processes' in text
    assert 'a multiple of `optim_wrapper.accumulative_counts`' in text
    run(config, tmp_path / 'other', stop=3)
    run(config, tmp_path / 'other', resume=True)
