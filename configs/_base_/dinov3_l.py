"""DINOv3 ViT-L/16, LVD-1689M, without labels; needs timm 1.0.20.

Child configs use the backbone, whose output is the map of its last block, as
`_base_.trunk`, the channels of that map as `_base_.width`, and four evenly
spaced blocks, for heads that take four maps, as `_base_.quarters`.

The file may also be Meta's own, or that of transformers, such as
'hf://facebook/dinov3-vitl16-pretrain-lvd1689m', after their licence.
"""

width = 1024
quarters = (5, 11, 17, 23)
trunk = dict(
    type='e3va_mm.E3VABackbone',
    trunk=dict(
        type='e3va_mm.DINOv3ViT',
        arch='large',
        out_indices=(23,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://timm/vit_large_patch16_dinov3.lvd1689m',
        ),
    ),
)
four_outputs = dict(trunk, trunk=dict(trunk['trunk'], out_indices=quarters))
