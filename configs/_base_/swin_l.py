"""Swin-L, pre-trained on ImageNet-22k.

Child configs use the backbone as `_base_.trunk` and the channels of its four
maps as `_base_.widths`.
"""

widths = [192, 384, 768, 1536]
trunk = dict(
    type='e3va_mm.E3VASwinTransformer',
    embed_dims=192,
    depths=(2, 2, 18, 2),
    num_heads=(6, 12, 24, 48),
    window_size=7,
    drop_path_rate=0.0,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/'
        'download/v1.0.0/swin_large_patch4_window7_224_22k.pth',
    ),
)
