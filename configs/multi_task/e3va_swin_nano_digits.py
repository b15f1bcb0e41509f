"""E3VA, a detector and a segmentor on one Swin-nano, digits in photographs.

Trains the models of cascade_e3va_swin_nano_digits.py and
upernet_e3va_swin_nano_digits.py together. They share one frozen trunk, and
images of one size go through it in one pass.
Data: python tools/make_digits.py
Run: python tools/train.py configs/multi_task/e3va_swin_nano_digits.py
Test: each task with its own config and adapter file, which `tools/adapter.py
task` extracts (docs/multi_task.md).
Trains 242,688 parameters in the two side paths, plus necks and heads.
Expected: 0.507 box AP, 0.479 mask AP and 17.1 mIoU on the test split (one
run, seed 0). The segmentor's own config trains twice as long at twice the
rate.
"""

_base_ = [
    'mmdet::_base_/default_runtime.py',
    '../_base_/e3va_runtime.py',
    '../_base_/safe_checkpoints.py',
    '../_base_/short_schedule.py',
]
tasks = dict(
    boxes='{{ fileDirname }}/../cascade_e3va_swin_nano_digits.py',
    classes='{{ fileDirname }}/../upernet_e3va_swin_nano_digits.py',
)
model = dict(type='e3va_mm.MultiTaskModel', tasks=tasks)
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='e3va_mm.MultiTaskDataset', tasks=tasks),
)

epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(
    by_epoch=True, T_max=epochs, convert_to_iter_based=True
)
custom_hooks = _base_.custom_hooks + [
    dict(type='e3va_mm.AdapterCheckpointHook', max_keep=1)
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(type='e3va_mm.AtomicCheckpointHook', max_keep_ckpts=1),
)
