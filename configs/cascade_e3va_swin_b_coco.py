"""E3VA, Cascade Mask R-CNN, Swin-B (ImageNet-22k), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729, its COCO rows.
Run: python tools/train.py configs/cascade_e3va_swin_b_coco.py
Differs from cascade_e3va_swin_l_coco.py in: trunk, neck widths.
Trains 1,195,008 values in the backbone (1.38 %), neck and heads as usual.
Expected: not yet measured. The paper's, of a 3x schedule with stronger
augmentation and heads: 50.5 box AP, 43.8 mask AP.
"""
_base_ = './cascade_e3va_swin_l_coco.py'
model = dict(
    backbone=dict(
        embed_dims=128,
        num_heads=(4, 8, 16, 32),
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/'
            'download/v1.0.0/swin_base_patch4_window7_224_22k.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
