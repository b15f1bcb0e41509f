"""E3VA, Faster R-CNN, Swin-T (ImageNet-1k), Pascal VOC 07+12, 12 epochs.

Paper: https://arxiv.org/abs/2306.09729 (its VOC rows are RetinaNet).
Run: python tools/train.py configs/faster_rcnn_e3va_swin_t_voc.py
Test: python tools/test.py configs/faster_rcnn_e3va_swin_t_voc.py CHECKPOINT
Differs from the stock R-50 config in the trunk, the neck's widths and AdamW.
The data set is repeated three times, so four epochs of the loop are twelve.
Trains 440,064 parameters in the backbone (1.60 %), plus neck and heads, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
    './_base_/swin_t.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk),
    neck=dict(in_channels=_base_.widths),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
