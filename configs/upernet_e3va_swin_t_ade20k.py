"""E3VA, UperNet, Swin-T (ImageNet-1k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are Swin-L).
Run: python tools/train.py configs/upernet_e3va_swin_t_ade20k.py
Test: python tools/test.py configs/upernet_e3va_swin_t_ade20k.py CHECKPOINT
Differs from the stock Swin-T config in: backbone, no drop path.
Pictures of 512x512, two on each of eight GPUs.
Trains 440,064 values in the backbone (1.60 %), heads as usual,
at a learning rate of 6e-5; the rest of the backbone is frozen.
Expected: not yet measured.
"""

# What `mmseg::swin/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/swin/'
    'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/swin_t.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(backbone=_base_.trunk)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
