"""Swin-L of MM-Grounding-DINO, with windows of 12, four outputs, five levels.

Child configs take `_base_.of_size` as their `model` and, as `load_from`,
`_base_.detector`.
"""

of_size = dict(
    num_feature_levels=5,
    backbone=dict(
        _delete_=True,
        type='e3va_mm.E3VASwinTransformer',
        pretrain_img_size=384,
        embed_dims=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        window_size=12,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        # The detector brings the weights.
        init_cfg=None,
    ),
    neck=dict(in_channels=[192, 384, 768, 1536], num_outs=5),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=5))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=5))),
)
detector = (
    'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/'
    'grounding_dino_swin-l_pretrain_all/'
    'grounding_dino_swin-l_pretrain_all-56d69e78.pth'
)
