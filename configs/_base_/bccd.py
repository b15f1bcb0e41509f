"""Blood cells, boxes in VOC form: 205 + 87 images for training and
validation, 72 for testing, of 640x480 pixels.

Data: git clone https://github.com/Shenggan/BCCD_Dataset data/BCCD_Dataset;
its folder BCCD is `data_root`. Two boxes have no area and are left out.
"""

data_root = 'data/BCCD_Dataset/BCCD/'
metainfo = dict(
    classes=('RBC', 'WBC', 'Platelets'),
    palette=[(220, 60, 60), (90, 120, 220), (240, 200, 40)],
)
# About half each way, in whole patches of 14 pixels.
image_scale = (336, 252)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        # CocoMetric reads `instances` where it is given no file.
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'instances',
        ),
    ),
]

cells = dict(
    type='XMLDataset',
    data_root=data_root,
    metainfo=metainfo,
    data_prefix=dict(sub_data_root=''),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        cells,
        ann_file='ImageSets/Main/train.txt',
        filter_cfg=dict(filter_empty_gt=True, bbox_min_size=1),
        pipeline=train_pipeline,
    ),
)
held_out = dict(cells, test_mode=True, pipeline=test_pipeline)
val_dataloader = dict(
    train_dataloader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(held_out, ann_file='ImageSets/Main/val.txt'),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(held_out, ann_file='ImageSets/Main/test.txt'),
)
val_evaluator = test_evaluator = dict(type='CocoMetric', metric='bbox')
