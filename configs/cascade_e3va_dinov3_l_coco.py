"""E3VA, Cascade Mask R-CNN, ViT-L (DINOv3), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this trunk).
Run: python tools/train.py configs/cascade_e3va_dinov3_l_coco.py
Test: python tools/test.py configs/cascade_e3va_dinov3_l_coco.py CHECKPOINT
Differs from the stock R-50 config in the trunk, the neck (ViTDet's simple
feature pyramid) and AdamW. Needs timm.
Trains 2,435,072 parameters in the backbone (0.80 %), plus neck and heads,
at a learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/dinov3_l.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(
        _delete_=True,
        type='e3va_mm.SimpleFeaturePyramid',
        in_channels=_base_.width,
        out_channels=256,
        num_outs=5,
    ),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
