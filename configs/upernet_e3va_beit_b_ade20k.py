"""E3VA, UperNet, BEiT-B (ImageNet-22k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are Swin-L).
Run: python tools/train.py configs/upernet_e3va_beit_b_ade20k.py
Test: python tools/test.py configs/upernet_e3va_beit_b_ade20k.py CHECKPOINT
Differs from the stock BEiT-B config in the backbone; drop path and layer-wise
learning rate decay are off. The weights are the file of BEiT's authors.
Images: 640x640, two on each of eight GPUs.
Trains 912,384 parameters in the backbone (1.05 %), plus neck and heads, at a
learning rate of 3e-5. The rest of the backbone is frozen.
Expected: not measured yet.
"""

# `mmseg::beit/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/beit/'
    'beit-base_upernet_8xb2-160k_ade20k-640x640.py',
    './_base_/beit_b.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(pretrained=None, backbone=_base_.trunk)
optim_wrapper = dict(
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
