"""Runs on a cache are runs without; what would not work is said before."""

import shutil
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS

from e3va_mm.backbones.trunk_cache import RESERVE
from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Trunk
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    side_path_config,
)

CACHE = dict(type='e3va_mm.TrunkCacheHook')
LOSSES = dict(type='LossesHook')


@HOOKS.register_module()
class LossesHook(Hook):
    """Keeps the losses of each iteration."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(float(outputs['loss']))


@TRANSFORMS.register_module()
class Noise:
    """Draws from a generator of its own."""

    generator = torch.Generator()

    def __call__(self, results):
        noise = torch.randint(0, 99, (), generator=self.generator)
        results['img'] = results['img'] + noise.numpy().astype('uint8')
        return results


@pytest.fixture
def config(tmp_path):
    """A detector of images 48x64 with random flips; two epochs."""
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 1)
    base = detection_config(tmp_path)
    path, *_ = side_path_config(
        tmp_path, base, 'neck=dict(in_channels=[32, 64, 128, 256])'
    )
    config = Config.fromfile(path)
    config.train_cfg = dict(by_epoch=True, max_epochs=2, val_begin=9)
    config.default_hooks.checkpoint.interval = -1
    config.randomness = dict(seed=0)
    dataset = config.train_dataloader.dataset
    dataset.pipeline[3:3] = [
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
    ]
    config.train_dataloader.dataset = dict(
        type='e3va_mm.FixedViews', dataset=dataset
    )
    return config


def cached(config, tmp_path, **options):
    config.model.backbone.trunk_cache = dict(
        dir=str(tmp_path / 'cache'), views=2, **options
    )
    return config


@pytest.fixture
def train(config, tmp_path):
    """The losses of a run, and the images that the trunk saw in it."""

    def train(*hooks, **options):
        seen, own = [], Trunk.run

        def counted(trunk, image, *args):
            seen.append(len(image))
            return own(trunk, image, *args)

        with mock.patch.object(Trunk, 'run', counted):
            runner = run(
                config,
                tmp_path / 'work',
                custom_hooks=[LOSSES, *hooks],
                **options,
            )
        (hook,) = (h for h in runner.hooks if isinstance(h, LossesHook))
        return hook.losses, sum(seen)

    return train


def test_losses_are_those_of_the_same_views_without_a_cache(
    train, config, tmp_path
):
    config.train_dataloader.dataset.views = 2
    live, images = train()
    assert (len(live), images) == (4, 8)
    cached(config, tmp_path, dtype='exact')
    filled, images = train(CACHE)
    assert filled == live
    assert images == 8 + 1  # 2 views of 4 images, one to tell the cost
    read, images = train(CACHE)
    assert read == live and images == 1
    # Weights of another trunk, other pixels.
    config.model.data_preprocessor.mean = [1.0, 2.0, 3.0]
    assert train(CACHE, **{'train_cfg.max_epochs': 1})[1] == 5
    cached(config, tmp_path, dtype='bf16')
    del config.train_dataloader.dataset.views
    config.model.data_preprocessor.mean = [123.675, 116.28, 103.53]
    rounded, _ = train(CACHE)
    assert rounded != live
    assert rounded == pytest.approx(live, rel=2e-2)


def test_what_reads_other_taps_has_entries_of_its_own(train, config, tmp_path):
    cached(config, tmp_path)
    train(CACHE)
    tuner = dict(type='NoSidePath')
    for images in (8 + 1, 1):
        _, seen = train(CACHE, **{'model.backbone.tuner': tuner})
        assert seen == images
    assert len([*(tmp_path / 'cache').iterdir()]) == 2


def test_the_cost_is_said_before_the_start(train, config, tmp_path, caplog):
    said = []
    with mock.patch('mmengine.logging.MMLogger.info', said.append):
        train(CACHE, **cached_options(tmp_path))
    (text,) = (t for t in said if t.startswith('trunk_cache: 2 views'))
    for part in (
        '2 views of 4 images in bf16, about 0.',
        'MiB each; 0 are there, the others need 0.0',
        f'GiB free at {tmp_path}',
        'less from a disk of ',
    ):
        assert part in text


def cached_options(tmp_path):
    options = dict(dir=str(tmp_path / 'cache'), views=2)
    return {
        'model.backbone.trunk_cache': options,
        'train_cfg.max_epochs': 1,
    }


def test_what_does_not_fit_is_refused(train, config, tmp_path):
    cached(config, tmp_path)
    usage = shutil._ntuple_diskusage(0, 0, RESERVE + 2**20)
    with (
        mock.patch('shutil.disk_usage', lambda path: usage),
        pytest.raises(ConfigError) as error,
    ):
        train(CACHE)
    text = str(error.value)
    assert 'of 0.00 GiB free' in text and '1 GiB to be left' in text
    assert "Set views=1 or dtype='int4' or `dir` on another disk." in text


def test_a_folder_that_cannot_be_made_is_refused(train, config, tmp_path):
    (tmp_path / 'cache').write_text('')
    cached(config, tmp_path)
    with pytest.raises(ConfigError, match='can be made and.*Set `dir` to an'):
        train(CACHE)


def test_a_config_that_cannot_work_is_refused(train, config, tmp_path):
    for options, message in (
        ({}, 'a backbone with `trunk_cache=.*but got 0'),
        (
            {'train_dataloader.dataset.views': 3},
            'FixedViews has views=3 and trunk_cache views=2',
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            train(CACHE, **options)
        cached(config, tmp_path)
    dataset = config.train_dataloader.dataset
    config.train_dataloader.dataset = dataset.dataset
    with pytest.raises(ConfigError, match='but got CocoDataset. Add, in'):
        train(CACHE)
    config.train_dataloader.dataset = dataset
    dataset.dataset.pipeline.insert(3, dict(type='Noise'))
    with pytest.raises(ConfigError, match='other pixels the second time'):
        train(CACHE)
    resize = dict(type='Resize', scale=(96, 96), keep_ratio=True)
    crop = dict(type='RandomCrop', crop_size=(0.7, 0.7))
    crop['crop_type'] = 'relative_range'
    dataset.dataset.pipeline[3:4] = [resize, crop]
    with pytest.raises(ConfigError, match='images of one size.*BatchFixedSi'):
        train(CACHE)
    loader = config.train_dataloader
    loader.batch_sampler = dict(type='mmdet.AspectRatioBatchSampler')
    loader.batch_size = 1
    train(CACHE)
