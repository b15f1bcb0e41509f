"""E3VA, UperNet, Swin-L (ImageNet-22k), ADE20K, 512x512, 160k iterations.

Paper: https://arxiv.org/abs/2306.09729, its ADE20K rows.
Run: python tools/train.py configs/upernet_e3va_swin_l_ade20k.py
Differs from the stock Swin-L config in: backbone, no drop path.
Trains 1,792,512 values in the backbone (0.92 %), heads as usual.
Expected: not yet measured. The paper's: 49.64 mIoU.
"""
# What `mmseg::swin/...` stands for. mmengine looks for that in a distribution
# called mmsegmentation alone, and onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/swin/'
    'swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/e3va_runtime.py',
]
model = dict(
    backbone=dict(
        type='e3va_mm.E3VASwinTransformer',
        drop_path_rate=0.,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/'
            'download/v1.0.0/swin_large_patch4_window7_224_22k.pth')))

# Two pictures on each of eight GPUs.
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
