"""Tiny configs of runs, and the same runs alone on the same batches."""

import copy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from e3va_mm.sweep import together, train_together
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)

HOOKS = """
custom_hooks = [
    dict(type='e3va_mm.TrainingGuardHook'),
    dict(type='e3va_mm.ResumeCheckHook'),
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False, interval={n}),
    dict(type='e3va_mm.DatasetCheckHook')]
default_hooks = dict(
    logger=dict(
        type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(
        type='e3va_mm.AtomicCheckpointHook', by_epoch=False, interval={n}))
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters={steps},
    val_interval={val})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10)]
log_processor = dict(by_epoch=False)
"""


def detection(folder, steps=4, n=2, val=4, more=''):
    make_coco(folder, 'train')
    make_coco(folder, 'val', 2)
    more += """
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
"""
    return _config(
        folder,
        detection_config(folder),
        'neck=dict(in_channels=[32, 64, 128, 256])',
        (steps, n, val, more),
    )


def segmentation(folder, steps=4, n=2, val=4, more=''):
    make_segmentation(folder)
    return _config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=0)',
        # All that trains has a gradient.
        (steps, n, val, f"{more}\nmodel['backbone']['out_indices'] = (3,)"),
    )


def _config(folder, base, rest, options):
    steps, n, val, more = options
    text = HOOKS.format(steps=steps, n=n, val=val) + more
    path, _, _ = side_path_config(folder, base, rest, text)
    return Path(path)


def runs(path, work, **options):
    """Configs by name: ``options`` are those of each."""
    found = {}
    for name, own in options.items():
        config = Config.fromfile(path)
        config.randomness = dict(seed=0)
        config.merge_from_dict(own)
        config.work_dir = str(work / name)
        found[name] = config
    return found


def trained(configs, monkeypatch=None, **kwargs):
    """Train together: losses by name, and the batches."""
    losses, batches = {name: [] for name in configs}, []
    if monkeypatch is not None:
        step = together.train_step

        def recording(runs, data):
            batches.append(copy.deepcopy(data))
            return step(runs, data)

        monkeypatch.setattr(together, 'train_step', recording)

    def on_step(iteration, total, values):
        for name, loss in values.items():
            losses[name].append(loss)

    ended = train_together(configs, 0, on_step, **kwargs)
    return losses, batches, ended


def alone(config, batches):
    """Train by mmengine's runner on these batches; the losses."""
    config = copy.deepcopy(config)
    config.experiment_name = Path(config.work_dir).name
    runner = Runner.from_cfg(config)
    # An own generator: a loader draws a seed from torch's else.
    runner._train_dataloader = DataLoader(
        _Recorded(batches),
        collate_fn=lambda batch: batch[0],
        generator=torch.Generator(),
    )
    runner.train()
    history, _ = runner.message_hub.get_scalar('train/loss').data
    return [float(loss) for loss in history]


class _Recorded(list):
    metainfo = dict(classes=('cat', 'dog', 'bird'))

    def full_init(self):
        pass
