"""The protocol of the comparison: Cascade Mask R-CNN, Swin-nano, digits.

The detector, data and optimizer of cascade_e3va_swin_nano_digits.py, trained
for four epochs with every tuner. tools/compare.py sets the tuner and one of
three learning rates. No tuner has stochastic depth.
Data: python tools/make_digits.py
Run: python tools/compare.py configs/comparison/cascade_swin_nano_digits.py
Expected: box AP on the test split 52.7 full, 45.4 fixed, 46.1 E3VA, 53.6
E3VA-Mix (means of three seeds, two of fixed); all in benchmarks/README.md.
"""

_base_ = '../cascade_e3va_swin_nano_digits.py'
model = dict(backbone=dict(drop_path_rate=0.0))
epochs = 4
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
