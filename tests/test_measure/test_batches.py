"""Which batch is found, what is measured for it, what a config becomes."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.measure import TrainingStep, batches, own_process
from e3va_mm.measure.batches import (
    Batch,
    BatchSearch,
    figures,
    most_objects,
    set_batch,
)
from e3va_mm.measure.fits import averaged_bytes
from tests.test_configs import CONFIGS
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    segmentation_config,
)

MIB = 2**20
RETINANET = CONFIGS / 'retinanet_e3va_swin_nano_digits.py'


class Pool:
    """Runs here what has a process of its own, or dies as that would."""

    error = None

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        done = Future()
        if self.error:
            done.set_exception(self.error)
        else:
            done.set_result(batches.figures(*args))
        return done


@pytest.fixture
def steps(monkeypatch):
    """The batches that were measured; a step takes 100 MiB an image."""
    found = []

    def figures(config, images, size, objects, device, share):
        found.append((images, size, objects, share))
        if share * 141 < 10:  # of a device with 141 GB
            return {}, {}
        memory = dict(weights=50 * MIB, optimizer=0, gradients=MIB)
        memory['peak'] = (200 + 100 * images) * MIB
        return memory, dict(trainable=2 * MIB)

    monkeypatch.setattr(own_process, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(batches, 'figures', figures)
    return found


@pytest.fixture
def search():
    config = Config.fromfile(RETINANET)
    config.train_dataloader.batch_size = 4
    config.optim_wrapper.accumulative_counts = 3
    return BatchSearch(config)


def test_the_largest_batch_fits_and_the_next_does_not(search, steps):
    assert search.sizes() == [1, 2, 3, 4, 6, 12]
    # 600 MiB, a tenth, 768, and the gradients that wait but for the one.
    four = round((600 * 1.1 + 768 + 7) * MIB)
    found = search.largest(four / 2**30)
    assert found == Batch(4, 3, (224, 224), four)
    assert search.largest((four - 1) / 2**30).images == 3
    # Nothing waits where an iteration is an update.
    assert search.largest(24).needs == round((1400 * 1.1 + 768) * MIB)
    assert len(steps) == len({step[0] for step in steps})
    with pytest.raises(ConfigError, match='1 of 224x224, to fit 1 GB, but it'):
        search.largest(1)


def test_batch_norms_of_segmentors_need_two_images(tmp_path, steps):
    config = Config.fromfile(segmentation_config(tmp_path))
    config.optim_wrapper.accumulative_counts = 2
    assert BatchSearch(config).sizes() == [2, 4]


def test_a_batch_that_fails_within_the_limit_of_a_gpu(
    search, steps, monkeypatch
):
    """What fits by the figures is run once within the limit."""
    device = SimpleNamespace(total_memory=141 * 2**30)
    monkeypatch.setattr(
        torch.cuda, 'get_device_properties', lambda name: device
    )
    search.device = 'cuda'
    assert search.largest(24).images == 12
    assert steps[-1][3] == pytest.approx(23.5 / 141)
    with pytest.raises(ConfigError, match='the smallest batch'):
        search.largest(9)


def test_a_measurement_that_is_killed(search, monkeypatch):
    monkeypatch.setattr(own_process, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(Pool, 'error', BrokenProcessPool())
    with pytest.raises(E3VAError, match='batch of 4 was killed: most likely'):
        search.largest(8)


def test_figures_are_those_of_a_step(monkeypatch):
    def memory(step):
        samples = step.data['data_samples']
        return [(s.img_shape, len(s.gt_instances)) for s in samples]

    monkeypatch.setattr(TrainingStep, 'memory', memory)
    config = Config.fromfile(RETINANET)
    found, parameters = figures(config, 2, (64, 96), 7, 'cpu', 1)
    assert found == [((64, 96), 7)] * 2
    assert parameters['trainable_backbone'] == 121_280


def test_what_a_config_imports_is_there(tmp_path, monkeypatch):
    (tmp_path / 'own_module.py').write_text('raise RuntimeError("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    config = Config.fromfile(RETINANET)
    config.custom_imports = dict(imports=['own_module'])
    with pytest.raises(RuntimeError, match='imported'):
        figures(config, 1, (64, 64), 1, 'cpu', 1)


def test_a_device_that_is_too_small_has_no_figures(monkeypatch):
    def run(self):
        raise torch.cuda.OutOfMemoryError('Tried to allocate 1 GiB.')

    monkeypatch.setattr(TrainingStep, 'run', run)
    config = Config.fromfile(RETINANET)
    assert figures(config, 1, (64, 64), 1, 'cpu', 1) == ({}, {})


def test_objects_are_those_of_the_fullest_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without the data of the quickstart
    assert most_objects(Config.fromfile(RETINANET))[0] == 100
    make_coco(tmp_path, 'train')
    config = Config.fromfile(detection_config(tmp_path))
    assert most_objects(config) == (1, 'the most of the training set')
    mosaic = dict(type='Mosaic', img_scale=(64, 64))
    data = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(
        type='MultiImageMixDataset', dataset=data, pipeline=[mosaic]
    )
    assert most_objects(config) == (4, '4 times the most, for Mosaic')
    config = Config.fromfile(segmentation_config(tmp_path))
    assert most_objects(config) == (0, 'mmseg has none')


def test_averaged_weights_are_memory():
    config = Config.fromfile(RETINANET)
    known = dict(weights=7 * MIB), dict(trainable=MIB)
    assert averaged_bytes(config, *known) == 0
    config.custom_hooks = [dict(type='EMAHook')]
    assert averaged_bytes(config, *known) == 7 * MIB
    config.custom_hooks = [dict(type='e3va_mm.TrainableEMAHook')]
    assert averaged_bytes(config, *known) == 4 * MIB


def test_what_counts_iterations_goes_with_the_batch(tmp_path):
    config = Config.fromfile(segmentation_config(tmp_path))
    config.param_scheduler = [
        dict(type='LinearLR', by_epoch=False, begin=0, end=3),
        dict(type='MultiStepLR', by_epoch=False, milestones=[1, 2]),
        dict(type='MultiStepLR', by_epoch=True, milestones=[1, 2]),
        dict(type='OneCycleLR', by_epoch=False, total_steps=3),
        dict(type='CosineRestartLR', by_epoch=False, periods=[1, 2]),
    ]
    config.custom_hooks = [dict(type='Any', by_epoch=False, interval=2)]
    config.default_hooks.timer = None  # switched off
    config.auto_scale_lr = dict(enable=True, base_batch_size=16)
    set_batch(config, Batch(1, 2, (48, 64), 0))
    assert config.train_dataloader.batch_size == 1
    assert config.optim_wrapper.accumulative_counts == 2
    assert (config.train_cfg.max_iters, config.train_cfg.val_interval) == (
        *(4, 4),
    )
    first, second, third, *others = config.param_scheduler
    assert (others[0].total_steps, others[1].periods) == (6, [2, 4])
    assert config.custom_hooks[0].interval == 4
    # mmengine compares it with the images of an iteration.
    assert config.auto_scale_lr.base_batch_size == 8
    assert (first.begin, first.end, second.milestones) == (0, 6, [2, 4])
    assert third.milestones == [1, 2]
    assert config.default_hooks.checkpoint.interval == 4
    assert config.default_hooks.logger.interval == 1
