"""DINOv2 ViT-S/14, distilled on LVD-142M, without labels.

Child configs use the backbone, whose output is the map of its last block, as
`_base_.trunk`, the channels of that map as `_base_.width`, and four evenly
spaced blocks, for heads that take four maps, as `_base_.quarters`.
"""

width = 384
quarters = (2, 5, 8, 11)
trunk = dict(
    type='e3va_mm.E3VAVisionTransformer',
    trunk_type='mmpretrain.VisionTransformer',
    arch='dinov2-small',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_indices=(11,),
    final_norm=True,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/'
        'dinov2_vits14/dinov2_vits14_pretrain.pth',
    ),
)
