"""Swin-L of MM-Grounding-DINO, with windows of 12, four outputs, five levels.

Child configs use `_base_.trunk`, `_base_.widths`, `_base_.levels` and, as
`load_from`, `_base_.detector`.
"""

widths = [192, 384, 768, 1536]
levels = 5
trunk = dict(
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
)
detector = (
    'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/'
    'grounding_dino_swin-l_pretrain_all/'
    'grounding_dino_swin-l_pretrain_all-56d69e78.pth'
)
