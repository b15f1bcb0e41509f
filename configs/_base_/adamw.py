"""The optimizer of the stock Swin detectors, for 16 images per update.

Child configs use it as `_base_.adamw`. `--auto-scale-lr` adapts the learning
rate to another batch.
"""

adamw = dict(
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    ),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
