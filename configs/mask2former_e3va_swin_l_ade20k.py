"""E3VA, Mask2Former, Swin-L (ImageNet-22k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are UperNet).
Run: python tools/train.py configs/mask2former_e3va_swin_l_ade20k.py
Test: python tools/test.py configs/mask2former_e3va_swin_l_ade20k.py CHECKPOINT
Differs from the stock Swin-L config in the backbone; drop path is off.
Images: 640x640, two on each of eight GPUs.
Trains 1,792,512 parameters in the backbone (0.92 %), plus the head, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

# `mmseg::mask2former/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/mask2former/'
    'mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(type='e3va_mm.E3VASwinTransformer', drop_path_rate=0.0)
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
