"""E3VA, RetinaNet, Swin-nano, digits in photographs.

A slim version of retinanet_e3va_swin_l_voc.py that trains in minutes on two
CPU cores.
Data: python tools/make_digits.py
Run: python tools/train.py configs/retinanet_e3va_swin_nano_digits.py
Test: python tools/test.py configs/retinanet_e3va_swin_nano_digits.py CHECKPOINT
Trains 121,280 parameters in the backbone (4.52 %), plus neck and head, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.333 box AP on the test split (one run, seed 0), which wrote
e3va_mm://retinanet_e3va_swin_nano_digits.safetensors.
"""  # noqa: E501

_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/digits_detection.py',
    './_base_/swin_nano.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
    './_base_/short_schedule.py',
]
width = 64
model = dict(
    backbone=dict(
        _delete_=True,
        type='e3va_mm.E3VASwinTransformer',
        **dict(_base_.swin_nano, out_indices=(1, 2, 3)),
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=width, start_level=0),
    bbox_head=dict(
        num_classes=10,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        # Digits are 17 to 66 pixels high and wide.
        anchor_generator=dict(octave_base_scale=3),
    ),
    test_cfg=dict(max_per_img=20),
)

# Without masks, so that a copy trains on annotations of boxes alone.
load_boxes = dict(type='LoadAnnotations', with_bbox=True)
train_pipeline = [_base_.train_pipeline[0], load_boxes]
train_pipeline += _base_.train_pipeline[2:]
test_pipeline = _base_.test_pipeline[:2] + [load_boxes]
test_pipeline += _base_.test_pipeline[3:]
# A box without area makes the loss infinite; this is for data in VOC format,
# of COCO's it is left out anyway.
large = dict(bbox_min_size=1)
train_dataloader = dict(
    dataset=dict(pipeline=train_pipeline, filter_cfg=large)
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

epochs = 12
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=epochs
)
val_evaluator = dict(metric='bbox')
test_evaluator = dict(metric='bbox')
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(
    by_epoch=True, T_max=epochs, convert_to_iter_based=True
)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        type='e3va_mm.AtomicCheckpointHook',
        max_keep_ckpts=2,
        save_best='coco/bbox_mAP',
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
