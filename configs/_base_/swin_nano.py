"""The nano trunk: 2.68 M parameters, stock SwinTransformer arguments.

Child configs use it as `**_base_.swin_nano`. The package contains the
weights; e3va_mm/assets/README.md says how they are made.
"""

swin_nano = dict(
    pretrain_img_size=112,
    embed_dims=32,
    depths=(2, 2, 4, 2),
    num_heads=(1, 2, 4, 8),
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    qk_scale=None,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.05,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
    with_cp=False,
    init_cfg=dict(
        type='Pretrained', checkpoint='e3va_mm://swin_nano_digits.safetensors'
    ),
)
