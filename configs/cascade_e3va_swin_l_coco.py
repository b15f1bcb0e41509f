"""E3VA, Cascade Mask R-CNN, Swin-L (ImageNet-22k), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (its COCO rows are Swin-B, 3x).
Run: python tools/train.py configs/cascade_e3va_swin_l_coco.py
Differs from the stock R-50 config in: trunk, neck widths, AdamW.
Trains 1,792,512 values in the backbone (0.92 %), neck and heads as usual.
Expected: not yet measured.
"""
_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/e3va_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='e3va_mm.E3VASwinTransformer',
        embed_dims=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        window_size=7,
        drop_path_rate=0.,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/'
            'download/v1.0.0/swin_large_patch4_window7_224_22k.pth')),
    neck=dict(in_channels=[192, 384, 768, 1536]))

# Two pictures on each of eight GPUs; `--auto-scale-lr` adapts to others.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.))
