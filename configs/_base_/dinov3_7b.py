"""DINOv3 ViT-7B/16, LVD-1689M, without labels; needs timm 1.0.20.

Child configs use the backbone, whose output is the map of its last block, as
`_base_.trunk`, the channels of that map as `_base_.width`, and four evenly
spaced blocks, for heads that take four maps, as `_base_.quarters`.

The file may also be Meta's own, or that of transformers, such as
'hf://facebook/dinov3-vit7b16-pretrain-lvd1689m', after their licence.
"""

width = 4096
quarters = (9, 19, 29, 39)
trunk = dict(
    type='e3va_mm.E3VABackbone',
    trunk=dict(
        type='e3va_mm.DINOv3ViT',
        arch='7b',
        out_indices=(39,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://timm/vit_7b_patch16_dinov3.lvd1689m',
        ),
    ),
)
four_outputs = dict(trunk, trunk=dict(trunk['trunk'], out_indices=quarters))
