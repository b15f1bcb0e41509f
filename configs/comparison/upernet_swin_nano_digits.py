"""The protocol of the comparison: UperNet, Swin-nano, digits.

The segmentor and optimizer of upernet_e3va_swin_nano_digits.py, with every
tuner; tools/compare.py sets the tuner and one of the learning rates.
Pre-trained weights that train do so at a tenth of that rate: at the full rate,
full fine-tuning forgets what the trunk knows before the new head can tell
digits apart. Images have the trunk's pre-training size, and there are four
times as many. No tuner has stochastic depth.
Data: python tools/make_digits.py --size 112 --train 1600 --val 400 --test 400
  --out data/digits_112
Run: python tools/compare.py configs/comparison/upernet_swin_nano_digits.py
Expected: mIoU on the test split 27.8 full, 23.8 fixed, 24.7 E3VA, 30.0
E3VA-Mix (means of three seeds, two of fixed); all in benchmarks/README.md.
"""

_base_ = '../upernet_e3va_swin_nano_digits.py'
data_root = 'data/digits_112/ade20k/'
crop_size = (112, 112)
train_pipeline = _base_.train_pipeline
for step in train_pipeline:
    if step.type == 'RandomResize':
        step.scale = crop_size
    elif step.type == 'RandomCrop':
        step.crop_size = crop_size
del step
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=16, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = dict(
    dataset=dict(data_root=data_root, pipeline=test_pipeline)
)

model = dict(
    data_preprocessor=dict(size=crop_size), backbone=dict(drop_path_rate=0.0)
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))
)
