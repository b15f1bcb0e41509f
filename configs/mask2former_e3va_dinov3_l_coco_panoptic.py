"""E3VA, Mask2Former, ViT-L (DINOv3), COCO panoptic, 100 epochs.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this trunk).
Run: python tools/train.py configs/mask2former_e3va_dinov3_l_coco_panoptic.py
Test: python tools/test.py configs/mask2former_e3va_dinov3_l_coco_panoptic.py CHECKPOINT
Differs from the stock Swin-L config in the trunk and the neck (ViTDet's simple
feature pyramid). Needs timm.
Images: 1024x1024, one on each of sixteen GPUs.
Trains 2,435,072 parameters in the backbone (0.80 %), plus neck and head,
at a learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""  # noqa: E501

_base_ = [
    'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_'
    'coco-panoptic.py',
    './_base_/dinov3_l.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(
        type='e3va_mm.SimpleFeaturePyramid',
        in_channels=_base_.width,
        out_channels=256,
    ),
    panoptic_head=dict(in_channels=[256, 256, 256, 256]),
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
