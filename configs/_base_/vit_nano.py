"""The nano ViT: 1.24 M parameters, stock VisionTransformer arguments.

Child configs use it as `**_base_.vit_nano`. Its one map has stride 8 and 128
channels. The weights come with the package; e3va_mm/assets/README.md says what
they are trained on and how to remake them.
"""

vit_nano = dict(
    trunk_type='mmpretrain.VisionTransformer',
    arch=dict(
        embed_dims=128, num_layers=6, num_heads=4, feedforward_channels=512
    ),
    img_size=112,
    patch_size=8,
    out_indices=(5,),
    final_norm=True,
    init_cfg=dict(
        type='Pretrained', checkpoint='e3va_mm://vit_nano_digits.safetensors'
    ),
)
