"""The protocol of the comparison: UperNet, Swin-nano, digits.

The segmentor, data and optimizer of upernet_e3va_swin_nano_digits.py in 600
iterations, the same for every tuning method; tools/compare.py sets the method
and one of three learning rates. No method has stochastic depth.
Data: python tools/make_digits.py
Run: python tools/compare.py configs/comparison/upernet_swin_nano_digits.py
Expected: not yet measured.
"""
_base_ = '../upernet_e3va_swin_nano_digits.py'
model = dict(backbone=dict(drop_path_rate=0.))
iterations = 600
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        T_max=iterations,
        eta_min_ratio=0.01)
]
default_hooks = dict(checkpoint=dict(interval=iterations))
