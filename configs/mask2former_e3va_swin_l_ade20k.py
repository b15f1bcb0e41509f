"""E3VA, Mask2Former, Swin-L (ImageNet-22k), ADE20K, 160k.

Paper: https://arxiv.org/abs/2306.09729 (its ADE20K rows are UperNet).
Run: python tools/train.py configs/mask2former_e3va_swin_l_ade20k.py
Test: python tools/test.py configs/mask2former_e3va_swin_l_ade20k.py CHECKPOINT
Differs from the stock Swin-L config in: backbone, no drop path.
Pictures of 640x640, two on each of eight GPUs.
Trains 1,792,512 values in the backbone (0.92 %), head as usual,
at a learning rate of 1e-4; the rest of the backbone is frozen.
Expected: not yet measured.
"""

# What `mmseg::mask2former/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/mask2former/'
    'mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(type='e3va_mm.E3VASwinTransformer', drop_path_rate=0.0)
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
