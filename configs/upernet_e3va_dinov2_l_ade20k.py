"""E3VA, UperNet, ViT-L (DINOv2), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are Swin-L).
Run: python tools/train.py configs/upernet_e3va_dinov2_l_ade20k.py
Test: python tools/test.py configs/upernet_e3va_dinov2_l_ade20k.py CHECKPOINT
Differs from the stock ViT-B config in: trunk, its outputs, the neck, which is
that of the stock BEiT configs, heads' widths. Needs mmpretrain.
Pictures of 512x512, two on each of eight GPUs, padded to 518x518,
which patches of 14 pixels fill; in tests to the next multiple of 14.
Trains 2,435,072 values in the backbone (0.80 %), neck and heads as usual,
at a learning rate of 6e-5; the rest of the backbone is frozen.
Expected: not yet measured.
"""

# What `mmseg::vit/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/vit/'
    'vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/dinov2_l.py',
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
        _delete_=True,
        type='Feature2Pyramid',
        embed_dim=_base_.width,
        rescales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[_base_.width] * 4),
    auxiliary_head=dict(in_channels=_base_.width),
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
