"""E3VA, SegFormer, MiT-B5 (ImageNet-1k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are UperNet).
Run: python tools/train.py configs/segformer_e3va_mit_b5_ade20k.py
Test: python tools/test.py configs/segformer_e3va_mit_b5_ade20k.py CHECKPOINT
Differs from the stock MiT-B5 config in the backbone; drop path is off.
Images: 512x512, two on each of eight GPUs.
Trains 1,516,352 parameters in the backbone (1.86 %), plus the head, at a
learning rate of 6e-5. The rest of the backbone is frozen. The head trains at
ten times that rate, as in the stock config.
Expected: not measured yet.
"""

# `mmseg::segformer/...`; mmengine resolves that only for the distribution
# mmsegmentation, not for onedl-mmsegmentation.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/segformer/'
    'segformer_mit-b5_8xb2-160k_ade20k-512x512.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='e3va_mm.E3VABackbone',
        trunk=dict(
            _base_.model.backbone,
            type='mmseg.MixVisionTransformer',
            drop_path_rate=0.0,
        ),
    )
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
