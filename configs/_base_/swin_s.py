"""Swin-S, pre-trained on ImageNet-1k.

Child configs use the backbone as `_base_.trunk` and the channels of its four
maps as `_base_.widths`.
"""

widths = [96, 192, 384, 768]
trunk = dict(
    type='e3va_mm.E3VASwinTransformer',
    embed_dims=96,
    depths=(2, 2, 18, 2),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    drop_path_rate=0.0,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/'
        'download/v1.0.0/swin_small_patch4_window7_224.pth',
    ),
)
