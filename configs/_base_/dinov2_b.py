"""DINOv2 ViT-B/14, distilled on LVD-142M, without labels.

Child configs use the backbone, whose output is the map of its last block, as
`_base_.trunk`, the channels of that map as `_base_.width`, and four evenly
spaced blocks, for heads that take four maps, as `_base_.quarters`.
"""

width = 768
quarters = (2, 5, 8, 11)
trunk = dict(
    type='e3va_mm.E3VAVisionTransformer',
    trunk_type='mmpretrain.VisionTransformer',
    arch='base',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_indices=(11,),
    final_norm=True,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/'
        'dinov2_vitb14/dinov2_vitb14_pretrain.pth',
    ),
)
