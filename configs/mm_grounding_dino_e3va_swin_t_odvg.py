"""E3VA, MM-Grounding-DINO with Swin-T, phrases.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this detector).
Run: python tools/train.py configs/mm_grounding_dino_e3va_swin_t_odvg.py
Test: python tools/test.py configs/mm_grounding_dino_e3va_swin_t_odvg.py CHECKPOINT
Fine-tuning on phrases or names of your own images (docs/grounding_dino.md):
data/odvg/train.jsonl, and data/odvg/val.json to validate on. Differs from
mm_grounding_dino_e3va_swin_t_coco.py in the data.
Trains 439,872 parameters in the backbone (1.60 %), plus everything behind
it, at a learning rate of 2e-4. The rest of the backbone is frozen, and so is
the text encoder. Needs the extra `grounding`.
Expected: not measured yet.
"""  # noqa: E501

_base_ = './mm_grounding_dino_e3va_swin_t_coco.py'
data_root = 'data/odvg/'
classes = ('person', 'bicycle', 'dog')  # of data/odvg/val.json
*steps, pack = _base_.train_pipeline
train_pipeline = [
    *steps,
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(
        type='RandomSamplingNegPos',
        tokenizer_name=_base_.lang_model_name,
        num_sample_negative=85,
        max_tokens=256,
    ),
    dict(pack, meta_keys=(*pack.meta_keys, 'tokens_positive', 'dataset_mode')),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ODVGDataset',
        data_root=data_root,
        ann_file='train.jsonl',
        # Of phrases; for names a JSON file with a name for each number.
        label_map_file=None,
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=False),
        return_classes=True,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='val.json',
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=classes),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator
