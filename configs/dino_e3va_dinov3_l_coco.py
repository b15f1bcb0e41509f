"""E3VA, DINO (5 scales), ViT-L (DINOv3), COCO, 12 epochs.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this trunk).
Run: python tools/train.py configs/dino_e3va_dinov3_l_coco.py
Test: python tools/test.py configs/dino_e3va_dinov3_l_coco.py CHECKPOINT
Differs from the stock Swin-L config in the trunk and the neck (ViTDet's simple
feature pyramid). Needs timm.
Trains 2,435,072 parameters in the backbone (0.80 %), plus all behind it,
at a learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    './_base_/dinov3_l.py',
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
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
