"""E3VA, Cascade Mask R-CNN, Swin-L, COCO 1x, on one card of 11 GB.

Paper: https://arxiv.org/abs/2306.09729 (on an 11 GB card, its Swin-L).
Run: python tools/train.py configs/cascade_e3va_swin_l_coco_11gb.py
Test: python tools/test.py configs/cascade_e3va_swin_l_coco_11gb.py CHECKPOINT
Differs from cascade_e3va_swin_l_coco.py in the tuner (taps in 4 bits, the
trunk in 16), mixed precision, 4 of the 16 images of an update at a time, and
the mask heads recomputed in the backward pass.
Trains 1,792,512 parameters in the backbone (0.92 %), plus neck and heads, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = ['./cascade_e3va_swin_l_coco.py', './_base_/lean_amp.py']
batch_size, steps = 4, 4
model = dict(backbone=dict(tuner=_base_.lean))
train_dataloader = dict(batch_size=batch_size)
optim_wrapper = dict(accumulative_counts=steps, **_base_.amp)
# The warm-up counts steps, of which each update now has several.
warm_up, decay = _base_.param_scheduler
param_scheduler = [dict(warm_up, end=warm_up.end * steps), decay]
auto_scale_lr = dict(base_batch_size=batch_size)
custom_hooks = _base_.custom_hooks + [
    dict(
        type='e3va_mm.ActivationCheckpointHook',
        modules=['roi_head.mask_head.*'],
    ),
]
