"""E3VA, RetinaNet, Swin-B (ImageNet-22k), Pascal VOC 07+12, 12 epochs.

Paper: https://arxiv.org/abs/2306.09729 (its VOC rows are Swin-L).
Run: python tools/train.py configs/retinanet_e3va_swin_b_voc.py
Test: python tools/test.py configs/retinanet_e3va_swin_b_voc.py CHECKPOINT
Differs from the stock R-50 config in the trunk, the neck and AdamW.
The data set is repeated three times, so four epochs of the loop are twelve.
Trains 1,194,752 parameters in the backbone (1.38 %), plus neck and head, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
    './_base_/swin_b.py',
    './_base_/adamw.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
# The neck does not use the map of the first stage: without it no output norm
# is left untrained.
model = dict(
    backbone=dict(_delete_=True, **_base_.trunk, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.widths[1:], start_level=0),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
