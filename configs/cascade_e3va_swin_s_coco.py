"""E3VA, Cascade Mask R-CNN, Swin-S (ImageNet-1k), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (its COCO rows are Swin-B, 3x).
Run: python tools/train.py configs/cascade_e3va_swin_s_coco.py
Test: python tools/test.py configs/cascade_e3va_swin_s_coco.py CHECKPOINT
Differs from the stock R-50 config in: trunk, neck widths, AdamW.
Trains 896,256 values in the backbone (1.84 %), neck and heads as usual,
at a learning rate of 1e-4; the rest of the backbone is frozen.
Expected: not yet measured.
"""

_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/swin_s.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(in_channels=_base_.widths),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
