"""E3VA, Cascade Mask R-CNN, Swin-nano, digits in photographs.

A slim version of cascade_e3va_swin_l_coco.py that trains in minutes on two CPU
cores.
Data: python tools/make_digits.py
Run: python tools/train.py configs/cascade_e3va_swin_nano_digits.py
Test: python tools/test.py configs/cascade_e3va_swin_nano_digits.py CHECKPOINT
Cost: about 6 minutes on two CPU cores, 0.12 GiB accounted peak, 0.6 s a step.
Trains 121,344 parameters in the backbone (4.53 %), plus neck and heads, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.496 box AP, 0.466 mask AP on the test split (one run, seed 0).
"""

_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/digits_detection.py',
    './_base_/swin_nano.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
    './_base_/short_schedule.py',
]
width = 64
num_classes = 10
model = dict(
    backbone=dict(
        _delete_=True, type='e3va_mm.E3VASwinTransformer', **_base_.swin_nano
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=[
            dict(
                head,
                in_channels=width,
                fc_out_channels=256,
                num_classes=num_classes,
            )
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(
            num_convs=2,
            in_channels=width,
            conv_out_channels=width,
            num_classes=num_classes,
        ),
    ),
    # Images have few objects, so fewer proposals than on COCO will do.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=32))
            for stage in _base_.model.train_cfg.rcnn
        ],
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=50), rcnn=dict(max_per_img=20)
    ),
)

epochs = 6
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
auto_scale_lr = dict(enable=False, base_batch_size=4)
