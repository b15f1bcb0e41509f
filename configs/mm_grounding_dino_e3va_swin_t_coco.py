"""E3VA, MM-Grounding-DINO with Swin-T, COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this detector).
Run: python tools/train.py configs/mm_grounding_dino_e3va_swin_t_coco.py
Test: python tools/test.py configs/mm_grounding_dino_e3va_swin_t_coco.py CHECKPOINT
Closed-set fine-tuning. Differs from the stock config in the backbone, without
drop path, and in the text encoder, which is frozen.
Trains 439,872 parameters in the backbone (1.60 %), plus everything behind
it, at a learning rate of 2e-4. The rest of the backbone is frozen, and so is
the text encoder. Needs the extra `grounding`.
Expected: not measured yet.
"""  # noqa: E501

_base_ = [
    'mmdet::mm_grounding_dino/coco/'
    'grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
    './_base_/e3va_runtime.py',
    './_base_/safe_checkpoints.py',
]
model = dict(
    backbone=dict(
        type='e3va_mm.E3VASwinTransformer',
        drop_path_rate=0.0,
        with_cp=False,
        # `load_from` brings the weights.
        init_cfg=None,
    ),
    # Recomputing the encoder needs fairscale: an ActivationCheckpointHook
    # does without.
    encoder=dict(num_cp=0),
)
optim_wrapper = dict(constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='e3va_mm.AtomicCheckpointHook'))
custom_hooks = _base_.custom_hooks + [
    # Without this line the text encoder trains, at a tenth of the rate.
    dict(type='e3va_mm.FreezeHook', freeze=['language_model']),
    dict(
        type='e3va_mm.ActivationCheckpointHook',
        modules=['encoder.layers.*', 'encoder.fusion_layers.*'],
    ),
    dict(type='e3va_mm.AdapterCheckpointHook'),
]
