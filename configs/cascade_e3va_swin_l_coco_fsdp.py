"""E3VA, Cascade Mask R-CNN, Swin-L, COCO 1x, its trunk over several cards.

Paper: https://arxiv.org/abs/2306.09729 (its COCO rows are Swin-B, 3x).
Run: python tools/train.py configs/cascade_e3va_swin_l_coco_fsdp.py
Test: python tools/test.py configs/cascade_e3va_swin_l_coco_fsdp.py CHECKPOINT
On N cards: bash tools/dist_train.sh configs/cascade_e3va_swin_l_coco_fsdp.py N
Differs from cascade_e3va_swin_l_coco.py in: FSDP in place of DDP. One card
alone trains as without.
Trains 1,792,512 values in the backbone (0.92 %), neck and heads as usual,
at a learning rate of 1e-4; the rest of the backbone is frozen.
Expected: not yet measured; the same as without.
"""
_base_ = ['./cascade_e3va_swin_l_coco.py', './_base_/fsdp.py']
