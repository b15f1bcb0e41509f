"""E3VA-Mix, Cascade Mask R-CNN, Swin-nano, digits in photographs.

Data: python tools/make_digits.py
Run: python tools/train.py configs/cascade_e3va_mix_swin_nano_digits.py
Test: python tools/test.py configs/cascade_e3va_mix_swin_nano_digits.py CHECKPOINT
Differs from cascade_e3va_swin_nano_digits.py in the tuner and the learning
rate, which the comparison chose on the validation split.
Trains 659,648 parameters in the backbone (24.61 %), plus neck and heads, at a
learning rate of 2e-3. The rest of the backbone is frozen.
Expected: 0.596 box AP, 0.564 mask AP on the test split (one run, seed 0).
"""  # noqa: E501

_base_ = './cascade_e3va_swin_nano_digits.py'
model = dict(backbone=dict(tuner=dict(type='E3VAMix')))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
