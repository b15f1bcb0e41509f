"""Data sets of a few images and configs of a few weights."""

import json

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import TINY, build_stock, randomised

CLASSES = ('cat', 'dog', 'bird')


def make_coco(
    folder, name, count=4, classes=CLASSES, suffix='.jpg', masks=False
):
    """``count`` images of 48x64 with one box each, and ``name.json``.

    ``masks`` are the boxes as polygons.
    """
    (folder / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        file_name = f'{i:03}{suffix}'
        pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / file_name)
        images.append(dict(id=i, file_name=file_name, height=48, width=64))
        annotations.append(
            dict(
                id=i,
                image_id=i,
                category_id=i % len(classes) + 1,
                bbox=[8, 8, 24, 20],
                area=480,
                iscrowd=0,
            )
        )
    if masks:
        for annotation in annotations:
            x, y, w, h = annotation['bbox']
            annotation['segmentation'] = [
                [x, y, x + w, y, x + w, y + h, x, y + h]
            ]
    categories = [dict(id=i + 1, name=n) for i, n in enumerate(classes)]
    content = dict(
        images=images, annotations=annotations, categories=categories
    )
    (folder / f'{name}.json').write_text(json.dumps(content))


def detection_config(folder, **options):
    """Write a Cascade R-CNN of three stages over ``folder``; its path.

    ``options`` are appended as further lines of the config.
    """
    text = f"""
_base_ = ['mmdet::_base_/models/cascade-rcnn_r50_fpn.py',
          'mmdet::_base_/default_runtime.py']
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True, type='ResNet', depth=18, base_channels=8,
        stem_channels=8, norm_cfg=dict(type='BN')),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16,
                roi_feat_size=7, num_classes={len(CLASSES)},
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss'),
                loss_bbox=dict(type='SmoothL1Loss')) for _ in range(3)
        ]),
    train_cfg=dict(
        rpn_proposal=dict(max_per_img=20),
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5,
                    min_pos_iou=0.5),
                sampler=dict(
                    type='RandomSampler', num=16, pos_fraction=0.25),
                pos_weight=-1, debug=False) for _ in range(3)
        ]),
    test_cfg=dict(rpn=dict(max_per_img=20)))
metainfo = dict(classes={CLASSES})
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset', data_root={str(folder)!r},
        ann_file='train.json', data_prefix=dict(img='train/'),
        metainfo=metainfo, filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(type='PackDetInputs')
        ]))
val_dataloader = dict(
    batch_size=1, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset', data_root={str(folder)!r},
        ann_file='val.json', data_prefix=dict(img='val/'),
        metainfo=metainfo, test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs',
                 meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                            'scale_factor'))
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file={str(folder / 'val.json')!r}, metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3))
default_hooks = dict(logger=dict(interval=1))
work_dir = {str(folder / 'work')!r}
experiment_name = {folder.as_posix().replace('/', '_')!r}
"""
    return _write(folder / 'detection.py', text, options)


def make_segmentation(folder, count=4):
    """``count`` images of 48x64 and maps of three classes."""
    random = np.random.default_rng(0)
    for part in ('images', 'maps'):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{i:03}.jpg')
        classes = random.integers(0, 3, (48, 64), dtype=np.uint8)
        Image.fromarray(classes).save(folder / 'maps' / f'{i:03}.png')


def segmentation_config(folder, **options):
    """Write an FCN over ``folder``, two iterations; its path."""
    text = f"""
default_scope = 'mmseg'
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', bgr_to_rgb=True, pad_val=0,
        seg_pad_val=255, size=(48, 64)),
    backbone=dict(
        type='ResNet', depth=18, base_channels=8, stem_channels=8,
        norm_cfg=dict(type='SyncBN')),
    decode_head=dict(
        type='FCNHead', in_channels=64, channels=8, in_index=3, num_convs=1,
        num_classes={len(CLASSES)}, norm_cfg=dict(type='SyncBN')),
    test_cfg=dict(mode='whole'))
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset', data_root={str(folder)!r},
        data_prefix=dict(img_path='images', seg_map_path='maps'),
        metainfo=dict(classes={CLASSES}),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')
        ]))
val_dataloader = dict(
    batch_size=1, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=train_dataloader['dataset'])
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0., direction='horizontal'),
         dict(type='RandomFlip', prob=1., direction='horizontal')],
        [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])
]
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3))
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=1),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
work_dir = {str(folder / 'work')!r}
experiment_name = {folder.as_posix().replace('/', '_')!r}
"""
    return _write(folder / 'segmentation.py', text, options)


def _write(path, text, options):
    lines = [f'{name} = {value}' for name, value in options.items()]
    path.write_text('\n'.join([text, *lines]))
    return str(path)


def truncate(path, share=0.5):
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def side_path_config(folder, base, rest, more=''):
    """Write ``experiment.py``: ``base`` with our backbone on a drawn trunk.

    ``rest`` are further arguments of the model, ``more`` further lines.
    Returns its path, that of the trunk's weights, and these.
    """
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
{more}
""")
    return config, weights, trunk
