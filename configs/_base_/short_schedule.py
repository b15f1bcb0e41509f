"""Optimizer and learning rates of trainings that take minutes.

Child configs set their length: `train_cfg`, and `T_max` of
`param_scheduler[1]`, in iterations unless `by_epoch` is set there.
"""

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='e3va_mm.SidePathOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, eta_min_ratio=0.01),
]
randomness = dict(seed=0)
