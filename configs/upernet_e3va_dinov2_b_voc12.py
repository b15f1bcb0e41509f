"""E3VA, UperNet, ViT-B (DINOv2), Pascal VOC 2012 (augmented), 40k.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this data).
Run: python tools/train.py configs/upernet_e3va_dinov2_b_voc12.py
Test: python tools/test.py configs/upernet_e3va_dinov2_b_voc12.py CHECKPOINT
Differs from the stock R-50 config in the trunk, an added neck, the heads'
widths and AdamW. Needs mmpretrain.
Images: 512x512, four on each of four GPUs, padded to 518x518 for patches of
14 pixels; test images are padded to the next multiple of 14.
Trains 913,920 parameters in the backbone (1.06 %), plus neck and heads, at a
learning rate of 6e-5. The rest of the backbone is frozen.
Expected: not measured yet.
"""

# `mmseg::upernet/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/upernet/'
    'upernet_r50_4xb4-40k_voc12aug-512x512.py',
    './_base_/dinov2_b.py',
    './_base_/adamw_poly_40k.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    data_preprocessor=dict(size=(518, 518), test_cfg=dict(size_divisor=14)),
    pretrained=None,
    backbone=dict(
        _delete_=True, **dict(_base_.trunk, out_indices=_base_.quarters)
    ),
    neck=dict(
        type='Feature2Pyramid', embed_dim=_base_.width, rescales=[4, 2, 1, 0.5]
    ),
    decode_head=dict(in_channels=[_base_.width] * 4),
    auxiliary_head=dict(in_channels=_base_.width),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.poly
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
