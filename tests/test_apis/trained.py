"""A detector and a segmentor that trained for two steps."""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from e3va_mm.engine import launch
from tests.helpers import TINY, build_stock, randomised
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
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
    trunk = randomised(build_stock()).state_dict()
    weights = folder / 'trunk.safetensors'
    save_file({f'backbone.{k}': v for k, v in trunk.items()}, weights)
    config = folder / 'experiment.py'
    config.write_text(f"""
_base_ = {str(base)!r}
model = dict(
    backbone=dict(
        _delete_=True, type='e3va_mm.E3VASwinTransformer', **{TINY},
        init_cfg=dict(type='Pretrained', checkpoint={str(weights)!r})),
    {rest})
# The inferencers of mmseg look for these.
visualizer = dict(name='visualizer')
test_pipeline = {{{{_base_.test_dataloader.dataset.pipeline}}}}
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
""")
    assert launch.train([str(config)]) == 0
    weights.unlink()  # from now on the checkpoint alone brings the trunk
    return str(config)
