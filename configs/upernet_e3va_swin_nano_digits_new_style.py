"""E3VA, UperNet, Swin-nano, digits: a new-style config.

The segmentor of upernet_e3va_swin_nano_digits.py without its auxiliary head,
with parents from `read_base()` and classes as `type`.
Data: python tools/make_digits.py
Run: python tools/train.py configs/upernet_e3va_swin_nano_digits_new_style.py
Test: python tools/test.py configs/upernet_e3va_swin_nano_digits_new_style.py CHECKPOINT
Trains 121,344 parameters in the backbone (4.53 %), plus the head, at a
learning rate of 2e-3. The rest of the backbone is frozen.
Expected: not measured yet.
"""  # noqa: E501

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmseg.models import (
    CrossEntropyLoss,
    EncoderDecoder,
    SegDataPreProcessor,
    UPerHead,
)
from torch.nn import SyncBatchNorm
from torch.optim import AdamW

from e3va_mm.engine.optim import SidePathOptimWrapperConstructor
from e3va_mm.models import E3VASwinTransformer

with read_base():
    from ._base_.digits_segmentation import *
    from ._base_.e3va_runtime import *
    from ._base_.swin_nano import swin_nano

# Where types given as strings are looked up.
default_scope = 'mmseg'
width = 64
num_classes = 11
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(
        type=SegDataPreProcessor,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(type=E3VASwinTransformer, **swin_nano),
    decode_head=dict(
        type=UPerHead,
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        channels=width,
        num_classes=num_classes,
        norm_cfg=dict(type=SyncBatchNorm),
        align_corners=False,
        # 94 % of the pixels are background.
        loss_decode=dict(
            type=CrossEntropyLoss, class_weight=[0.1] + [1.0] * 10
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

iterations = 1200
train_cfg = dict(
    type=IterBasedTrainLoop, max_iters=iterations, val_interval=iterations
)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(
    type=OptimWrapper,
    constructor=SidePathOptimWrapperConstructor,
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, by_epoch=False, end=50),
    dict(
        type=CosineAnnealingLR,
        by_epoch=False,
        T_max=iterations,
        eta_min_ratio=0.01,
    ),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(
        type='e3va_mm.AtomicCheckpointHook',
        by_epoch=False,
        interval=iterations,
        max_keep_ckpts=2,
        save_best='mIoU',
    ),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
