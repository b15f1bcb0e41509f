"""E3VA, RetinaNet, DINOv2 ViT-S, blood cells.

A real trunk and real images that train in minutes on one CPU core. Needs
mmpretrain.
Data: git clone https://github.com/Shenggan/BCCD_Dataset data/BCCD_Dataset
Run: python tools/train.py configs/retinanet_e3va_dinov2_s_bccd.py
Test: python tools/test.py configs/retinanet_e3va_dinov2_s_bccd.py CHECKPOINT
Trains 456,960 parameters in the backbone (2.07 %), plus neck and head, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.471, 0.465 and 0.469 box AP on validation (seeds 0 to 2 of
tools/compare.py); on a frozen trunk 0.439, 0.440 and 0.442.
"""

_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/bccd.py',
    './_base_/dinov2_s.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
    './_base_/short_schedule.py',
]
width = 64
model = dict(
    # Images are whole patches, which padding to 32 pixels would not keep.
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(_delete_=True, **dict(_base_.trunk, out_indices=(3, 7, 11))),
    # A map for each depth, so that a frozen trunk shows all that it has.
    neck=[
        dict(
            type='e3va_mm.SimpleFeaturePyramid',
            in_channels=_base_.width,
            out_channels=width,
            scales=(2, 1, 0.5),
        ),
        dict(
            type='FPN',
            in_channels=[width] * 3,
            out_channels=width,
            num_outs=3,
        ),
    ],
    bbox_head=dict(
        num_classes=3,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        # Without norms so narrow a head, initialised as the stock one, learns
        # slowly at first.
        norm_cfg=dict(type='GN', num_groups=8),
        # Half of the platelets, red and white cells are at most 21, 54 and 99
        # pixels large: anchors begin with 21.
        anchor_generator=dict(octave_base_scale=3, strides=[7, 14, 28]),
    ),
)

# Pre-trained weights that train, the last norm or all: at the full rate they
# forget what the trunk knows.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.03)))
)
epochs = 3
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=epochs
)
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
auto_scale_lr = dict(enable=False, base_batch_size=2)
