"""E3VA, Cascade Mask R-CNN, Swin-S (ImageNet-1k), COCO 3x.

Paper: https://arxiv.org/abs/2306.09729 (its COCO rows are Swin-B).
Run: python tools/train.py configs/cascade_e3va_swin_s_coco_3x.py
Test: python tools/test.py configs/cascade_e3va_swin_s_coco_3x.py CHECKPOINT
The recipe of Swin's authors: 4conv1fc heads with GIoU, scale jitter with
crops, 36 epochs, mixed precision. Differs from the stock ConvNeXt-T config of
that recipe in the trunk, the neck's widths, and AdamW without layer decay.
Trains 896,256 parameters in the backbone (1.84 %), plus neck and heads, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_'
    'amp-ms-crop-3x_coco.py',
    './_base_/swin_s.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
]
# In place of mmpretrain, which the stock config imports for its ConvNeXt; see
# _base_/safe_checkpoints.py.
custom_imports = dict(
    _delete_=True, imports=['e3va_mm.checkpoint'], allow_failed_imports=False
)
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(in_channels=_base_.widths),
)
optim_wrapper = dict(
    _delete_=True, **dict(_base_.adamw, type='AmpOptimWrapper')
)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
