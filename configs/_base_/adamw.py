"""The optimizer of the E3VA detectors, that of the stock Swin detectors.

A name for children, as `_base_.adamw`. For 16 pictures an update, two on each
of eight GPUs; `--auto-scale-lr` adapts to others.
"""

adamw = dict(
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    ),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
