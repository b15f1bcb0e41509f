"""E3VA, Mask2Former, Swin-L (ImageNet-22k), COCO panoptic, 100 epochs.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this segmentor).
Run: python tools/train.py configs/mask2former_e3va_swin_l_coco_panoptic.py
Test: python tools/test.py configs/mask2former_e3va_swin_l_coco_panoptic.py CHECKPOINT
Differs from the stock Swin-L config in the backbone; drop path is off.
Images: 1024x1024, one on each of sixteen GPUs.
Trains 1,792,512 parameters in the backbone (0.92 %), plus the head, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""  # noqa: E501

_base_ = [
    'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_'
    'coco-panoptic.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(type='e3va_mm.E3VASwinTransformer', drop_path_rate=0.0)
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
