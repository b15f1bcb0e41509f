"""The protocol of the comparison: RetinaNet, DINOv2 ViT-S, blood cells.

The detector, data and schedule of retinanet_e3va_dinov2_s_bccd.py with every
tuner; tools/compare.py sets the tuner and one of the learning rates.
No tuner has stochastic depth.
Data: git clone https://github.com/Shenggan/BCCD_Dataset data/BCCD_Dataset
Run: python tools/compare.py configs/comparison/retinanet_dinov2_s_bccd.py
"""

_base_ = '../retinanet_e3va_dinov2_s_bccd.py'
model = dict(backbone=dict(drop_path_rate=0.0))
