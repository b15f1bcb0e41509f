"""Swin-B of MM-Grounding-DINO, with windows of 12 and three outputs.

Child configs take `_base_.of_size` as their `model` and, as `load_from`,
`_base_.detector`.
"""

of_size = dict(
    backbone=dict(
        _delete_=True,
        type='e3va_mm.E3VASwinTransformer',
        pretrain_img_size=384,
        embed_dims=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=12,
        out_indices=(1, 2, 3),
        drop_path_rate=0.0,
        # The detector brings the weights.
        init_cfg=None,
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
detector = (
    'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/'
    'grounding_dino_swin-b_pretrain_all/'
    'grounding_dino_swin-b_pretrain_all-f9818a7c.pth'
)
