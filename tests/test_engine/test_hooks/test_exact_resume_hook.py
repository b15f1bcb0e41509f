"""Runs with interruptions give the weights of runs without, bit for bit."""

import functools
import importlib
import json
import pickle
import random
import types

import mmengine
import numpy as np
import pytest
import torch
from mmcv.transforms import TRANSFORMS, BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from e3va_mm.engine.hooks import ExactResumeHook
from e3va_mm.engine.hooks.exact_resume_hook import (
    _Batches,
    _check_data,
    _Sample,
    _SeededDataset,
    seed_all,
)
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
    make_segmentation,
    segmentation_config,
    side_path_config,
)

HOOK = "custom_hooks = [dict(type='e3va_mm.ExactResumeHook')]"
COMMON = """
randomness = dict(seed=3)
val_cfg = None
val_dataloader = None
val_evaluator = None
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4),
    dict(type='PolyLR', eta_min=0, power=0.9, begin=4, end=20, by_epoch=False)
]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
"""
SEGMENTATION = """
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(40, 40)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')]))
train_cfg = dict(max_iters=7)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
"""
HEAD = (
    'decode_head=dict(in_channels=256, in_index=3, dropout_ratio=0.3, '
    "norm_cfg=dict(type='BN')), auxiliary_head=None"
)


EPOCHS = dict(
    train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3),
    train_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=True)),
)
# 5 pictures, 2 at a time: epochs of 3 iterations.
BY_EPOCH = dict(default_hooks=dict(checkpoint=dict(by_epoch=True, interval=1)))


def segmentor_with(folder, hook=HOOK, **options):
    """Iterations, an infinite sampler, dropout, random pictures."""
    make_segmentation(folder, 5)
    more = COMMON + SEGMENTATION + hook
    # The pictures stay random.
    more += f'\ntrain_dataloader.update({options.pop("train_dataloader", {})})'
    for name, value in options.items():
        more += f'\n{name} = {value}'
    config, *_ = side_path_config(
        folder, segmentation_config(folder), HEAD, more
    )
    return config


def merged(*options):
    """Config options, those of several cases together."""
    result = {}
    for each in options:
        for name, value in each.items():
            result[name] = {**result.get(name, {}), **value}
    return result


ACCUMULATION = dict(
    optim_wrapper=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-2),
        accumulative_counts=3,
        clip_grad=dict(max_norm=0.1),
        _delete_=True,
    )
)
SHUFFLED = dict(
    train_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=True))
)
WORKERS = dict(
    train_dataloader=dict(
        num_workers=2,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
)
AMP = dict(
    optim_wrapper=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        # Grows after 2, 4 and 6 updates.
        loss_scale=dict(init_scale=1024.0, growth_interval=2),
    )
)
CASES = {
    'iterations': ({}, (2, 5)),
    # Where an update is due after 3, 6 and 7.
    'iterations, with a worker': (
        dict(train_dataloader=dict(num_workers=1)),
        (2, 5),
    ),
    'accumulation': (ACCUMULATION, (1, 2, 3)),
    'passes over a finite sampler': (SHUFFLED, (3, 5)),
    'a sampler without a seed': (
        dict(train_dataloader=dict(sampler=dict(type='GlobalSampler'))),
        (2, 4),
    ),
    'amp': (AMP, (3,)),
    'inside epochs': (EPOCHS, (3, 8)),
    'ends of epochs': (merged(EPOCHS, BY_EPOCH), (4, 8)),
    'inside epochs, with workers': (merged(EPOCHS, WORKERS), (2,)),
    'inside epochs, accumulation': (merged(EPOCHS, ACCUMULATION), (2, 5)),
}
ALL = 'custom_hooks = [dict(type="e3va_mm.ExactResumeHook"), %s]'


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
    config = segmentor_with(tmp_path, **options)
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
    config = segmentor_with(tmp_path, 'custom_hooks = []')
    whole = run(config, tmp_path / 'whole')
    again = run(config, tmp_path / 'again')
    pieces = run_in_pieces(config, tmp_path / 'pieces', (3,))
    assert not differing(weights(whole), weights(again))
    assert differing(weights(whole), weights(pieces))


@pytest.mark.parametrize('average', ['EMAHook', 'e3va_mm.TrainableEMAHook'])
def test_averages_go_on(tmp_path, average):
    hook = f'dict(type={average!r}, momentum=0.3, update_buffers=True)'
    config = segmentor_with(tmp_path, ALL % hook)
    run(config, tmp_path / 'whole')
    run_in_pieces(config, tmp_path / 'pieces', (2, 5))
    whole, pieces = (
        torch.load(tmp_path / name / 'iter_7.pth', weights_only=False)
        for name in ('whole', 'pieces')
    )
    for key in ('state_dict', 'ema_state_dict'):
        assert not differing(whole[key], pieces[key])
    assert whole['ema_state_dict']['steps'] == 7
    key = 'decode_head.conv_seg.weight'
    average = whole['state_dict'][key]
    assert not torch.equal(average, whole['ema_state_dict'][f'module.{key}'])


def test_detector_with_batches_by_aspect_ratio(tmp_path):
    """Epochs, a wrapper of the data set, heads that draw their samples."""
    make_coco(tmp_path, 'train', 5)
    file = tmp_path / 'train.json'
    content = json.loads(file.read_text())
    for i, image in enumerate(content['images']):
        if i % 2:  # said to be upright: buckets of three and two
            image['height'], image['width'] = 64, 48
    file.write_text(json.dumps(content))
    base = detection_config(tmp_path)
    config, *_ = side_path_config(
        tmp_path,
        base,
        'neck=dict(in_channels=[32, 64, 128, 256])',
        COMMON
        + HOOK
        + """
pipeline = _base_.train_dataloader.dataset.pipeline
pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
inner = dict(_base_.train_dataloader.dataset, pipeline=pipeline)
train_dataloader = dict(
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=inner))
train_cfg = dict(max_epochs=2)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
""",
    )
    whole = run(config, tmp_path / 'whole')
    pieces = run_in_pieces(config, tmp_path / 'pieces', (2, 5, 7))
    assert pieces.iter == whole.iter == 10
    assert not differing(weights(whole), weights(pieces))


def test_workers_do_not_matter(tmp_path):
    config = segmentor_with(tmp_path, **EPOCHS)
    none = run(config, tmp_path / 'none', **{'train_cfg.max_epochs': 1})
    two = run(
        config,
        tmp_path / 'two',
        **{'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 2},
    )
    assert not differing(weights(none), weights(two))


@HOOKS.register_module()
class SeenHook(Hook):
    """Writes down the numbers of iterations and the samples of each."""

    def before_train(self, runner):
        runner.seen = self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        paths = [s.img_path[-7:-4] for s in data_batch['data_samples']]
        self.seen.append((runner.epoch, batch_idx, paths))


def test_an_epoch_goes_on_where_it_was(tmp_path, monkeypatch):
    config = segmentor_with(tmp_path, ALL % "dict(type='SeenHook')", **EPOCHS)
    whole = run(config, tmp_path / 'whole').seen
    assert [each[:2] for each in whole] == [
        (epoch, i) for epoch in range(3) for i in range(3)
    ]
    assert sorted(whole[0][2] + whole[1][2] + whole[2][2])[:5] == [
        f'{i:03}' for i in range(5)
    ]
    first = run(config, tmp_path / 'pieces', stop=4).seen
    loaded = []
    real = BaseDataset.__getitem__

    def getitem(self, index):
        loaded.append(index)
        return real(self, index)

    monkeypatch.setattr(BaseDataset, '__getitem__', getitem)
    rest = run(config, tmp_path / 'pieces', resume=True).seen
    assert first + rest == whole
    # Nothing of what the epoch has had: four of two batches, five of the next.
    assert len(loaded) == sum(len(paths) for *_, paths in rest)


def test_what_hooks_set_reaches_the_data_set():
    class Data:
        pipeline = 'first'

        def __len__(self):
            return 3

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
    assert drawn[0][:2] == ('second', 2)
    assert data[2][:2] == ('second', 2)
    again = pickle.loads(pickle.dumps(_SeededDataset([1, 2])))
    assert len(again) == 2


@pytest.mark.parametrize(
    'numbers', [[(0, 0, 1), (0, 1, 0), (1, 0, 0)], [(3, 0, 5), (3, 0, 5, 1)]]
)
def test_seeds_of_neighbours_differ(numbers):
    drawn = set()
    for each in numbers:
        seed_all(each)
        drawn |= {random.random(), np.random.rand(), torch.rand(1).item()}
    assert len(drawn) == 3 * len(numbers)


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
    drawn = set()
    for numbers in used:
        seed_all(numbers)
        drawn |= {random.random(), np.random.rand(), torch.rand(1).item()}
    assert len(drawn) == 3 * 9


def test_loops_that_load_before_they_run_are_refused(tmp_path, monkeypatch):
    iterator = 'mmengine.runner.loops._InfiniteDataloaderIterator'
    monkeypatch.delattr(f'{iterator}.skip_iter')
    config = segmentor_with(tmp_path)
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / 'work')
    text = str(error.value)
    assert 'needs mmengine>=0.10.8, whose' in text
    assert f'but got {mmengine.__version__}. ' in text
    assert "update it: pip install 'onedl-mmengine>=0.10.8'" in text


class OwnRandom(BaseTransform):
    def __init__(self):
        self.generator = np.random.default_rng(0)

    def transform(self, results):
        return results


TRANSFORMS.register_module(module=OwnRandom)
REFUSED = {
    'randomness = dict(seed=None)': 'set `randomness=dict(seed=0)`',
    "param_scheduler = [dict(type='ReduceOnPlateauLR', monitor='loss')]": (
        'do not look at metrics, but got ReduceOnPlateauLR'
    ),
    'custom_hooks += [dict(type="EarlyStoppingHook", monitor="mIoU")]': (
        'the hook EarlyStoppingHook remembers what checkpoints do not hold'
    ),
    'train_dataloader["dataset"]["pipeline"].insert(2, dict(type='
    '"RandomApply", transforms=[dict(type="OwnRandom")]))': (
        'the transform OwnRandom has random numbers of its own'
    ),
    'train_cfg = dict(type="PassesLoop")': (
        'but got `train_cfg.type=PassesLoop`'
    ),
    'train_dataloader["sampler"] = dict(type="OwnSampler")': (
        'the sampler OwnSampler has random numbers of its own'
    ),
}


@LOOPS.register_module()
class PassesLoop(IterBasedTrainLoop):
    pass


@DATA_SAMPLERS.register_module()
class GlobalSampler(RandomSampler):
    """Draws from torch's global generator, pass after pass."""

    def __init__(self, dataset, seed, shuffle):
        super().__init__(dataset)


@DATA_SAMPLERS.register_module()
class OwnSampler(RandomSampler):
    def __init__(self, dataset, seed, shuffle):
        super().__init__(dataset, generator=torch.Generator())


@pytest.mark.parametrize('option', REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path, option):
    config = segmentor_with(tmp_path)
    config.write_text(config.read_text() + '\n' + option)
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / 'work')
    assert REFUSED[option] in str(error.value)
    assert 'without the hook all is as in mmengine' in str(error.value)
    assert not list((tmp_path / 'work').glob('*.pth'))


def test_modules_that_remember_are_refused(tmp_path):
    class DropBlock(torch.nn.Module):
        pass

    config = segmentor_with(tmp_path)
    hook = dict(type='AddModuleHook', module=DropBlock())
    with pytest.raises(ConfigError, match='the module DropBlock remembers'):
        run(
            config,
            tmp_path / 'work',
            custom_hooks=[dict(type='e3va_mm.ExactResumeHook'), hook],
        )


class TwoOptimizersHook(Hook):
    def before_run(self, runner):
        wrapper = runner.optim_wrapper
        runner.optim_wrapper = OptimWrapperDict(one=wrapper, other=wrapper)


def test_several_optimizers_are_refused(tmp_path):
    config = segmentor_with(tmp_path)
    hooks = [
        dict(type='e3va_mm.ExactResumeHook'),
        dict(type=TwoOptimizersHook),
    ]
    options = dict(custom_hooks=hooks, param_scheduler=None)
    with pytest.raises(ConfigError, match='`optim_wrapper` has several'):
        run(config, tmp_path / 'work', **options)


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize(
    'loader, expected',
    [
        (DataLoader(Stream()), '`train_dataloader.dataset.type=Stream`'),
        (
            DataLoader([1], batch_size=None),
            '`train_dataloader.batch_size` is None',
        ),
    ],
)
def test_data_that_is_refused(loader, expected):
    with pytest.raises(ConfigError) as error:
        _check_data(loader)
    assert expected in str(error.value)


def test_another_runner_is_refused():
    with pytest.raises(ConfigError) as error:
        ExactResumeHook().before_train(types.SimpleNamespace())
    text = str(error.value)
    assert "mmengine's Runner, but got SimpleNamespace" in text
    assert 'leave out `runner_type`' in text


@HOOKS.register_module()
class AddModuleHook(Hook):
    def __init__(self, module):
        self.module = module

    def before_run(self, runner):
        runner.model.added = self.module


@pytest.mark.parametrize(
    'options, change',
    [
        ({'randomness.seed': 4}, 'seed 3, now 4'),
        ({'train_dataloader.batch_size': 1}, 'batch_size 2, now 1'),
        (
            {'optim_wrapper.accumulative_counts': 2},
            'accumulative_counts 1, now 2',
        ),
        (
            {'train_dataloader.dataset.indices': 4},
            'samples 5, now 4',
        ),
        (
            {'train_dataloader.sampler.type': 'DefaultSampler'},
            "sampler 'InfiniteSampler', now 'DefaultSampler'",
        ),
    ],
)
def test_another_run_is_refused(tmp_path, options, change):
    config = segmentor_with(tmp_path)
    run(config, tmp_path / 'work', stop=1)
    with pytest.raises(CheckpointError) as error:
        run(config, tmp_path / 'work', resume=True, **options)
    text = str(error.value)
    assert f'it was written with {change}' in text
    assert 'Set these as they were, or leave ExactResumeHook out' in text


def test_a_checkpoint_without_the_hook_is_refused(tmp_path):
    config = segmentor_with(tmp_path)
    run(config, tmp_path / 'work', stop=1, custom_hooks=[])
    with pytest.raises(CheckpointError, match='written without ExactResumeH'):
        run(config, tmp_path / 'work', resume=True)


def test_several_processes_save_after_updates(tmp_path, monkeypatch):
    config = segmentor_with(tmp_path, **ACCUMULATION)
    monkeypatch.setattr(Runner, 'world_size', 2)
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / 'work')
    text = str(error.value)
    assert 'one every 1 iterations, and an update every 3' in text
    assert 'that is a multiple of `accumulative_counts`' in text
    run(config, tmp_path / 'work', **{'default_hooks.checkpoint.interval': 6})


def test_gradients_of_several_processes_are_not_there(tmp_path, monkeypatch):
    config = segmentor_with(tmp_path, **ACCUMULATION)
    monkeypatch.setattr(Runner, 'world_size', 2)
    name = 'e3va_mm.engine.hooks.exact_resume_hook._check_savers'
    monkeypatch.setattr(name, lambda runner: None)
    run(config, tmp_path / 'work', stop=2)
    with pytest.raises(CheckpointError) as error:
        run(config, tmp_path / 'work', resume=True)
    text = str(error.value)
    assert 'between two updates of the weights by 2 processes' in text
    assert 'a multiple of `optim_wrapper.accumulative_counts`' in text
