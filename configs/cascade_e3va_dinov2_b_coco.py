"""E3VA, Cascade Mask R-CNN, ViT-B (DINOv2), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this trunk).
Run: python tools/train.py configs/cascade_e3va_dinov2_b_coco.py
Test: python tools/test.py configs/cascade_e3va_dinov2_b_coco.py CHECKPOINT
Differs from the stock R-50 config in the trunk, the neck (ViTDet's simple
feature pyramid), AdamW, and the strides of 14-pixel patches. Needs mmpretrain.
Trains 913,920 parameters in the backbone (1.06 %), plus neck and heads, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/dinov2_b.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
# Patches of 14 pixels at 4, 2, 1 and 0.5 times their number. Anchors have
# 14/16 of their usual sizes, too.
strides = [3.5, 7, 14, 28]
model = dict(
    data_preprocessor=dict(pad_size_divisor=28),
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(
        _delete_=True,
        type='e3va_mm.SimpleFeaturePyramid',
        in_channels=_base_.width,
        out_channels=256,
        num_outs=5,
    ),
    rpn_head=dict(anchor_generator=dict(strides=strides + [56])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        mask_roi_extractor=dict(featmap_strides=strides),
    ),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
