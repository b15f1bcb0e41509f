"""Swin-B, pre-trained on ImageNet-22k.

Child configs use the backbone as `_base_.trunk` and the channels of its four
maps as `_base_.widths`.
"""

widths = [128, 256, 512, 1024]
trunk = dict(
    type='e3va_mm.E3VASwinTransformer',
    embed_dims=128,
    depths=(2, 2, 18, 2),
    num_heads=(4, 8, 16, 32),
    window_size=7,
    drop_path_rate=0.0,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/'
        'download/v1.0.0/swin_base_patch4_window7_224_22k.pth',
    ),
)
