"""E3VA, UperNet, Swin-nano, digits in photographs.

A slim version of upernet_e3va_swin_l_ade20k.py that trains in minutes on two
CPU cores.
Data: python tools/make_digits.py
Run: python tools/train.py configs/upernet_e3va_swin_nano_digits.py
Test: python tools/test.py configs/upernet_e3va_swin_nano_digits.py CHECKPOINT
Trains 121,344 parameters in the backbone (4.53 %), plus heads, at a learning
rate of 2e-3. The rest of the backbone is frozen.
Expected: 25.6 mIoU on the test split (one run, seed 0), which wrote
e3va_mm://upernet_e3va_swin_nano_digits.safetensors.
"""

# `mmseg::_base_/...`; see upernet_e3va_swin_l_ade20k.py.
_base_ = [
    __import__('mmseg').__path__[0]
    + '/.mim/configs/_base_/models/upernet_swin.py',
    __import__('mmseg').__path__[0]
    + '/.mim/configs/_base_/default_runtime.py',
    './_base_/digits_segmentation.py',
    './_base_/swin_nano.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
    './_base_/short_schedule.py',
]
width = 64
num_classes = 11
# 94 % of the pixels are background.
class_weight = [0.1] + [1.0] * 10
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True, type='e3va_mm.E3VASwinTransformer', **_base_.swin_nano
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=width,
        num_classes=num_classes,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=width,
        num_classes=num_classes,
        loss_decode=dict(class_weight=class_weight),
    ),
)

iterations = 1200
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
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
