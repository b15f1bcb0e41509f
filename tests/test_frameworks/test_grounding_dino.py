"""The decoder of Grounding DINO runs, whenever mmdet is imported."""

import subprocess
import sys
from pathlib import Path

import torch

from e3va_mm.frameworks.grounding_dino import LAYERS, mend

ROOT = Path(__file__).resolve().parents[2]


def test_it_decodes():
    from mmdet.models.layers.transformer import grounding_dino_layers as layers

    attention = dict(embed_dims=32, num_heads=4)
    decoder = layers.GroundingDinoTransformerDecoder(
        num_layers=1,
        return_intermediate=True,
        post_norm_cfg=None,
        layer_cfg=dict(
            self_attn_cfg=attention,
            cross_attn_text_cfg=attention,
            cross_attn_cfg=dict(attention, num_levels=1),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=32),
        ),
    )
    once = layers.GroundingDinoTransformerDecoder.forward
    mend(layers)
    assert layers.GroundingDinoTransformerDecoder.forward is once
    queries, _ = decoder(
        query=torch.randn(2, 5, 32),
        value=torch.randn(2, 16, 32),
        key_padding_mask=None,
        self_attn_mask=None,
        reference_points=torch.rand(2, 5, 4),
        spatial_shapes=torch.tensor([[4, 4]]),
        level_start_index=torch.tensor([0]),
        valid_ratios=torch.ones(2, 1, 2),
        reg_branches=[torch.nn.Linear(32, 4)],
        memory_text=torch.randn(2, 3, 32),
        text_attention_mask=torch.zeros(2, 3, dtype=torch.bool),
    )
    assert queries.shape == (1, 2, 5, 32)


def test_it_is_mended_when_mmdet_is_imported():
    code = f"""
import sys
import e3va_mm.checkpoint
assert {LAYERS!r} not in sys.modules
from mmdet.models.layers.transformer import dino_layers
from {LAYERS} import GroundingDinoTransformerDecoder as Decoder
stock = dino_layers.DinoTransformerDecoder.forward
assert Decoder.forward is not stock
assert Decoder.forward.__code__ is stock.__code__
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
