"""E3VA, MM-Grounding-DINO with Swin-B, COCO 1x.

Paper: https://arxiv.org/abs/2306.09729 (without rows of this detector).
Run: python tools/train.py configs/mm_grounding_dino_e3va_swin_b_coco.py
Test: python tools/test.py configs/mm_grounding_dino_e3va_swin_b_coco.py CHECKPOINT
Differs from mm_grounding_dino_e3va_swin_t_coco.py in the size; images go
through the trunk without autocast, unlike in the stock config.
Trains 1,194,752 parameters in the backbone (1.38 %), plus everything behind
it, at a learning rate of 2e-4. The rest of the backbone is frozen, and so is
the text encoder. Needs the extra `grounding`.
Expected: not measured yet.
"""  # noqa: E501

_base_ = [
    './mm_grounding_dino_e3va_swin_t_coco.py',
    './_base_/mm_grounding_dino_b.py',
]
model = _base_.of_size
load_from = _base_.detector
