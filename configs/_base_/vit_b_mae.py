"""ViT-B/16, pre-trained by MAE on ImageNet-1k, without labels.

Child configs use the backbone, whose output is the map of its last block, as
`_base_.trunk`, and the channels of that map as `_base_.width`.
"""

width = 768
trunk = dict(
    type='e3va_mm.E3VAVisionTransformer',
    trunk_type='mmpretrain.VisionTransformer',
    arch='base',
    img_size=224,
    patch_size=16,
    out_indices=(11,),
    final_norm=True,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/'
        'mae_pretrain_vit_base.pth',
    ),
)
