"""E3VA, UperNet, BEiT-L (ImageNet-22k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are Swin-L).
Run: python tools/train.py configs/upernet_e3va_beit_l_ade20k.py
Test: python tools/test.py configs/upernet_e3va_beit_l_ade20k.py CHECKPOINT
Differs from the stock BEiT-L config in: backbone, no drop path, no decay of
the learning rate over layers. Weights are the file of BEiT's authors.
Pictures of 640x640, one on each of eight GPUs, two steps an update.
Trains 2,433,024 values in the backbone (0.80 %), neck and heads as usual,
at a learning rate of 2e-5; the rest of the backbone is frozen.
Expected: not yet measured.
"""

# What `mmseg::beit/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/beit/'
    'beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py',
    './_base_/beit_l.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(pretrained=None, backbone=_base_.trunk)
optim_wrapper = dict(
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
