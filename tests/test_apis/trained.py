"""A detector and a segmentor that trained for two steps."""

from pathlib import Path
from typing import NamedTuple

from e3va_mm.commands import launch
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
    picture: str
    folder: Path


def trained_detector(folder):
    make_coco(folder, 'train')
    make_coco(folder, 'val', 2)
    base = detection_config(folder)
    # Two steps teach nothing: every score is small.
    rest = (
        'neck=dict(in_channels=[32, 64, 128, 256]), '
        'test_cfg=dict(rcnn=dict(score_thr=0.))'
    )
    config = _train(folder, base, rest)
    picture = folder / 'val' / '000.jpg'
    return Trained(
        config, str(folder / 'work' / 'epoch_1.pth'), str(picture), folder
    )


def trained_segmentor(folder):
    make_segmentation(folder)
    base = segmentation_config(folder)
    heads = (
        'decode_head=dict(in_channels=256, in_index=3, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None"
    )
    config = _train(folder, base, heads)
    picture = folder / 'images' / '000.jpg'
    return Trained(
        config, str(folder / 'work' / 'iter_2.pth'), str(picture), folder
    )


def _train(folder, base, rest):
    more = """
# The inferencers of mmseg look for these.
visualizer = dict(name='visualizer')
test_pipeline = {{_base_.test_dataloader.dataset.pipeline}}
# With some seeds two steps leave a segmentor that sees one class everywhere.
randomness = dict(seed=0)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
"""
    config, weights, _ = side_path_config(folder, base, rest, more)
    assert launch.train([str(config)]) == 0
    weights.unlink()  # from now on the checkpoint alone brings the trunk
    return str(config)
