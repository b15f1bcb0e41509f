"""E3VA, SegFormer, MiT-B5 (ImageNet-1k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are UperNet).
Run: python tools/train.py configs/segformer_e3va_mit_b5_ade20k.py
Test: python tools/test.py configs/segformer_e3va_mit_b5_ade20k.py CHECKPOINT
Differs from the stock MiT-B5 config in: backbone, no drop path.
Pictures of 512x512, two on each of eight GPUs.
Trains 1,516,352 values in the backbone (1.86 %), head as usual,
at a learning rate of 6e-5; the rest of the backbone is frozen. The head's is
ten times as high, as in the stock config.
Expected: not yet measured.
"""

# What `mmseg::segformer/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
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
