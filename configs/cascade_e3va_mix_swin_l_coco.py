"""E3VA-Mix, Cascade Mask R-CNN, Swin-L (ImageNet-22k), COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 is E3VA's; the mixers are not in it.
Run: python tools/train.py configs/cascade_e3va_mix_swin_l_coco.py
Test: python tools/test.py configs/cascade_e3va_mix_swin_l_coco.py CHECKPOINT
Differs from cascade_e3va_swin_l_coco.py in the tuner.
Trains 2,728,832 parameters in the backbone (1.40 %), plus neck and heads, at a
learning rate of 1e-4. The rest of the backbone is frozen.
Expected: not measured yet.
"""

_base_ = './cascade_e3va_swin_l_coco.py'
model = dict(backbone=dict(tuner=dict(type='E3VAMix')))
