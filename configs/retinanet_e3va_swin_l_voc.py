"""E3VA, RetinaNet, Swin-L (ImageNet-22k), Pascal VOC 07+12, 12 epochs.

Paper: https://arxiv.org/abs/2306.09729, its VOC rows.
Run: python tools/train.py configs/retinanet_e3va_swin_l_voc.py
Differs from the stock R-50 config in: trunk, neck, AdamW.
The data is repeated three times: four epochs of the loop are twelve.
Trains 1,792,128 values in the backbone (0.92 %), neck and head as usual.
Expected: not yet measured. The paper's: 86.5 AP50.
"""
_base_ = [
    'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
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
        # The neck does not use the map of the first stage: without it no
        # output norm is left untrained.
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/'
            'download/v1.0.0/swin_large_patch4_window7_224_22k.pth')),
    neck=dict(in_channels=[384, 768, 1536], start_level=0))

# Two pictures on each of eight GPUs; `--auto-scale-lr` adapts to others.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.))
