"""E3VA, UperNet, Swin-L (ImageNet-22k), Pascal VOC 2012 (augmented), 40k.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this data).
Run: python tools/train.py configs/upernet_e3va_swin_l_voc12.py
Test: python tools/test.py configs/upernet_e3va_swin_l_voc12.py CHECKPOINT
Differs from the stock R-50 config in the trunk, the heads' widths and AdamW.
Images: 512x512, four on each of four GPUs.
Trains 1,792,512 parameters in the backbone (0.92 %), plus heads, at a learning
rate of 6e-5. The rest of the backbone is frozen.
Expected: not measured yet.
"""

# `mmseg::upernet/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/upernet/'
    'upernet_r50_4xb4-40k_voc12aug-512x512.py',
    './_base_/swin_l.py',
    './_base_/adamw_poly_40k.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, **_base_.trunk),
    decode_head=dict(in_channels=_base_.widths),
    auxiliary_head=dict(in_channels=_base_.widths[2]),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.poly
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
