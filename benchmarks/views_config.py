"""Blood cells with scale, crop, flip and colour drawn anew, or in fixed views.

Run: python tools/train.py benchmarks/views_config.py --cfg-options
  train_dataloader.dataset.views=4
without options for fresh augmentation in every epoch.
"""

_base_ = '../configs/retinanet_e3va_dinov2_s_bccd.py'
image_scale = (224, 168)
load, boxes, _, flip, pack = _base_.train_pipeline
cells = _base_.train_dataloader.dataset
cells.pipeline = [
    load,
    boxes,
    dict(
        type='RandomResize',
        scale=image_scale,
        ratio_range=(1.0, 1.5),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=image_scale),
    flip,
    dict(type='PhotoMetricDistortion'),
    pack,
]
train_dataloader = dict(
    dataset=dict(_delete_=True, type='e3va_mm.FixedViews', dataset=cells)
)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = image_scale
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

epochs = 8
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = epochs
