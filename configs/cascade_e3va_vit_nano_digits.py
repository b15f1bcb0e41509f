"""E3VA, Cascade Mask R-CNN, ViT-nano, digits in photographs.

Differs from cascade_e3va_swin_nano_digits.py in the trunk (a plain ViT) and
the neck (ViTDet's simple feature pyramid). Needs mmpretrain.
Data: python tools/make_digits.py
Run: python tools/train.py configs/cascade_e3va_vit_nano_digits.py
Test: python tools/test.py configs/cascade_e3va_vit_nano_digits.py CHECKPOINT
Cost: 600 steps of about 0.5 s on one CPU core, four minutes on two.
Trains 76,288 parameters in the backbone (6.15 %), plus neck and heads, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.445 and 0.460 box AP, 0.369 and 0.378 mask AP on the test split
(two runs of seed 0, on one and on two threads).
"""

_base_ = ['./cascade_e3va_swin_nano_digits.py', './_base_/vit_nano.py']
# Patches of 8 pixels at 2, 1 and 0.5 times their number.
strides = [4, 8, 16]
model = dict(
    backbone=dict(
        _delete_=True, type='e3va_mm.E3VAVisionTransformer', **_base_.vit_nano
    ),
    neck=dict(
        _delete_=True,
        type='e3va_mm.SimpleFeaturePyramid',
        in_channels=128,
        out_channels=_base_.width,
        scales=(2, 1, 0.5),
        num_outs=5,
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        mask_roi_extractor=dict(featmap_strides=strides),
    ),
)
