"""A detector and a segmentor that trained for two steps, once a process."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from e3va_mm.commands import train
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)


class Trained(NamedTuple):
    config: str
    checkpoint: str
    adapter: str
    trunk: str
    image: str
    folder: Path


@cache
def trained_detector(base):
    """Below a folder of this test run."""
    folder = base / 'detector'
    make_coco(folder, 'train')
    make_coco(folder, 'val', 2)
    # Two steps teach nothing: every score is small.
    rest = (
        'neck=dict(in_channels=[32, 64, 128, 256]), '
        'test_cfg=dict(rcnn=dict(score_thr=0.))'
    )
    base = detection_config(folder)
    return _train(folder, base, rest, 'epoch_1', folder / 'val' / '000.jpg')


@cache
def trained_segmentor(base):
    """Below a folder of this test run."""
    folder = base / 'segmentor'
    make_segmentation(folder)
    rest = (
        'decode_head=dict(in_channels=256, in_index=3, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None"
    )
    base = segmentation_config(folder)
    return _train(folder, base, rest, 'iter_2', folder / 'images' / '000.jpg')


def _train(folder, base, rest, name, image):
    more = f"""
# The inferencers of mmseg look for these.
visualizer = dict(name='visualizer')
test_pipeline = {{{{_base_.test_dataloader.dataset.pipeline}}}}
# With some seeds two steps leave a segmentor that sees one class everywhere.
randomness = dict(seed=0)
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch={'epoch' in name})]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
"""
    config, trunk, _ = side_path_config(folder, base, rest, more)
    assert train.main([str(config)]) == 0
    work = folder / 'work'
    return Trained(
        str(config),
        str(work / f'{name}.pth'),
        str(work / f'adapter_{name}.safetensors'),
        str(trunk),
        str(image),
        folder,
    )
