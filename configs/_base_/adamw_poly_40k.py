"""Optimizer and schedule of the stock Swin segmentors, for 40k iterations.

Child configs use them as `_base_.adamw` and `_base_.poly`. For 16 images per
update.
"""

adamw = dict(
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01
    ),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
poly = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500
    ),
    dict(
        type='PolyLR',
        eta_min=0.0,
        power=1.0,
        begin=1500,
        end=40000,
        by_epoch=False,
    ),
]
