"""E3VA, UperNet, Swin-L (ImageNet-22k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are Swin-L).
Run: python tools/train.py configs/upernet_e3va_swin_l_ade20k.py
Test: python tools/test.py configs/upernet_e3va_swin_l_ade20k.py CHECKPOINT
Differs from the stock Swin-L config in the backbone; drop path is off.
Images: 512x512, two on each of eight GPUs.
Trains 1,792,512 parameters in the backbone (0.92 %), plus heads, at a learning
rate of 6e-5. The rest of the backbone is frozen.
Expected: not measured yet. The paper reports 49.64 mIoU.
"""

# `mmseg::swin/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/swin/'
    'swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/swin_l.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(backbone=_base_.trunk)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
