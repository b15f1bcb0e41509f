"""A detector, a segmentor and a classifier tuned apart on one trunk."""

from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import save_file

from e3va_mm.registry import MODELS
from e3va_mm.weights import adapter_of, trunk_records
from tests.helpers import TINY, build_stock, randomised
from tests.test_engine.test_hooks.tiny import (
    CLASSES,
    detection_config,
    make_segmentation,
    segmentation_config,
)
from tests.trunk_cases import awake

MEAN, STD = [100.0, 120.0, 140.0], [50.0, 60.0, 70.0]
PREPARED = f'mean={MEAN}, std={STD}, bgr_to_rgb=True'
CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict({backbone}, out_indices=(3, )),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=256))
data_preprocessor = dict(
    num_classes=3, mean={mean}, std={std}, to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=48),
    dict(type='PackInputs')]
test_dataloader = dict(
    batch_size=1, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='none', pipeline=test_pipeline,
        metainfo=dict(classes={classes})))
"""
DETECTOR = """
_base_ = {base!r}
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[], name='boxes of {folder}')
model = dict(
    data_preprocessor=dict({prepared}, pad_size_divisor=1),
    backbone=dict(_delete_=True, {backbone}),
    neck=dict(in_channels=[32, 64, 128, 256]),
    test_cfg=dict(rcnn=dict(score_thr=0., max_per_img=5)))
"""
SEGMENTOR = """
_base_ = {base!r}
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[], name='parts of {folder}')
model = dict(
    data_preprocessor=dict({prepared}),
    backbone=dict(_delete_=True, {backbone}, out_indices=(3, )),
    decode_head=dict(
        in_channels=256, in_index=0, dropout_ratio=0.,
        norm_cfg=dict(type='BN')),
    test_cfg=dict(mode={mode!r}, crop_size=(32, 32), stride=(16, 16)))
"""


class Tuned(NamedTuple):
    config: str
    adapter: str


def tuned_apart(folder, mode='whole', trunk=None, **side_path):
    """Configs and adapter files of the three by name, images beside."""
    make_segmentation(folder)
    if trunk is None:
        trunk = folder / 'trunk.safetensors'
        save_file(randomised(build_stock()).state_dict(), trunk)
    init = dict(type='Pretrained', checkpoint=str(trunk))
    backbone = (
        f"type='e3va_mm.E3VASwinTransformer', **{TINY}, init_cfg={init}, "
        f'side_path={dict(rank=4, **side_path)}'
    )
    shared = dict(backbone=backbone, prepared=PREPARED, folder=folder)
    texts = dict(
        boxes=DETECTOR.format(base=detection_config(folder), **shared),
        parts=SEGMENTOR.format(
            base=segmentation_config(folder), mode=mode, **shared
        ),
        kinds=CLASSIFIER.format(mean=MEAN, std=STD, classes=CLASSES, **shared),
    )
    return {
        name: _tuned(folder, name, text, seed)
        for seed, (name, text) in enumerate(texts.items())
    }


def _tuned(folder, name, text, seed):
    """Write a config, draw what trains, and write the adapter file of it."""
    path = folder / f'{name}.py'
    path.write_text(text)
    config = Config.fromfile(path)
    if 'data_preprocessor' in config:
        config.model.data_preprocessor = config.data_preprocessor
    with DefaultScope.overwrite_default_scope(config.default_scope):
        torch.manual_seed(seed)
        model = MODELS.build(config.model)
        model.init_weights()
    awake(model.backbone)
    adapter = folder / f'{name}.safetensors'
    adapter_of(
        model,
        trunk_records(model),
        config=config.pretty_text,
        dataset_meta=dict(
            classes=CLASSES, palette=[(200, 0, 0), (0, 200, 0), (0, 0, 200)]
        ),
    ).write(adapter)
    return Tuned(str(path), str(adapter))
