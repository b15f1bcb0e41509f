"""E3VA, UperNet, Swin-T (ImageNet-1k), Pascal VOC 2012 (augmented), 40k.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this data).
Run: python tools/train.py configs/upernet_e3va_swin_t_voc12.py
Test: python tools/test.py configs/upernet_e3va_swin_t_voc12.py CHECKPOINT
Differs from the stock R-50 config in: trunk, heads' widths, AdamW.
Pictures of 512x512, four on each of four GPUs.
Trains 440,064 values in the backbone (1.60 %), heads as usual,
at a learning rate of 6e-5; the rest of the backbone is frozen.
Expected: not yet measured.
"""

# What `mmseg::upernet/...` stands for. mmengine looks for that in a
# distribution called mmsegmentation alone; onedl-mmsegmentation is another.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/upernet/'
    'upernet_r50_4xb4-40k_voc12aug-512x512.py',
    './_base_/swin_t.py',
    './_base_/adamw_poly_40k.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, **_base_.trunk),
    decode_head=dict(in_channels=_base_.widths),
    auxiliary_head=dict(in_channels=_base_.widths[2]),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.poly
