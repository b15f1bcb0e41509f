"""E3VA, Cascade Mask R-CNN, Swin-L, COCO 1x, by DeepSpeed.

Paper: https://arxiv.org/abs/2306.09729 (its COCO rows are Swin-B, 3x).
Run: bash tools/dist_train.sh configs/cascade_e3va_swin_l_coco_deepspeed.py N
Test: python tools/test.py configs/cascade_e3va_swin_l_coco.py CHECKPOINT
Differs from cascade_e3va_swin_l_coco.py in: ZeRO of stage 2 in place of DDP,
adapter files. Needs DeepSpeed: pip install "deepspeed<0.19"
Trains 1,792,512 values in the backbone (0.92 %), neck and heads as usual,
at a learning rate of 1e-4; the rest of the backbone is frozen.
CHECKPOINT is an adapter file: DeepSpeed's own are for resuming alone.
Expected: not yet measured; the same as without.
"""
_base_ = ['./cascade_e3va_swin_l_coco.py', './_base_/deepspeed.py']
optim_wrapper = _base_.deepspeed
custom_hooks = _base_.custom_hooks + [
    dict(type='e3va_mm.AdapterCheckpointHook'),
]
