"""E3VA, DINO (5 scales), Swin-L (ImageNet-22k), COCO, 12 epochs.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this detector).
Run: python tools/train.py configs/dino_e3va_swin_l_coco.py
Test: python tools/test.py configs/dino_e3va_swin_l_coco.py CHECKPOINT
Differs from the stock Swin-L config in the backbone; drop path is off.
Trains 1,792,512 parameters in the backbone (0.92 %), plus everything behind
it, at a learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = [
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(
        type='e3va_mm.E3VASwinTransformer', drop_path_rate=0.0, with_cp=False
    )
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
