"""E3VA, UperNet, ViT-L (DINOv3), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this trunk).
Run: python tools/train.py configs/upernet_e3va_dinov3_l_ade20k.py
Test: python tools/test.py configs/upernet_e3va_dinov3_l_ade20k.py CHECKPOINT
Differs from the stock ViT-B config in the trunk, its outputs and the neck
(that of the stock BEiT configs). Needs timm.
Images: 512x512, two on each of eight GPUs.
Trains 2,441,216 parameters in the backbone (0.81 %), plus neck and heads,
at a learning rate of 6e-5. The rest of the backbone is frozen.
Expected: not measured yet.
"""

# `mmseg::vit/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/vit/'
    'vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/dinov3_l.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, **_base_.four_outputs),
    neck=dict(
        _delete_=True,
        type='Feature2Pyramid',
        embed_dim=_base_.width,
        rescales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[_base_.width] * 4),
    auxiliary_head=dict(in_channels=_base_.width),
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
