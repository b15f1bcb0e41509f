"""BEiT-L/16, pre-trained and fine-tuned on ImageNet-22k.

Child configs use the backbone, with the arguments and outputs of the stock
BEiT-L segmentors, as `_base_.trunk`, and the channels of its four maps as
`_base_.width`. All images must have the size `img_size`, since the tables of
relative positions are made for it.
"""

width = 1024
trunk = dict(
    type='e3va_mm.E3VAVisionTransformer',
    trunk_type='mmseg.BEiT',
    img_size=(640, 640),
    patch_size=16,
    embed_dims=1024,
    num_layers=24,
    num_heads=16,
    mlp_ratio=4,
    out_indices=(7, 11, 15, 23),
    qv_bias=True,
    init_values=1e-6,
    drop_path_rate=0.0,
    norm_cfg=dict(type='LN', eps=1e-6),
    act_cfg=dict(type='GELU'),
    # The file of BEiT's authors; it needs no conversion.
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/addf400/files/releases/download/v1.0/'
        'beit_large_patch16_224_pt22k_ft22k.pth',
    ),
)
