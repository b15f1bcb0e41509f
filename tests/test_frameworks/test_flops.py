"""mmengine counts the operations of a side path."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info

from tests.trunk_cases import build_ours

# Blocks, tokens and channels of the stages, for an image of 64 x 64.
STAGES = {
    'swin of mmseg': [(2, 256, 32), (1, 64, 64)],
    'vit': [(2, 17, 32), (2, 17, 32)],
}
RANK, WIDTH = 4, 8


def count(trunk, **tuner):
    backbone = build_ours(trunk, tuner).eval()
    found = get_model_complexity_info(
        backbone, (3, 64, 64), show_table=False, show_arch=False
    )
    assert found['params'] == sum(p.numel() for p in backbone.parameters())
    return found['flops']


def adapters(taps, blocks, tokens, channels):
    """Two products of low rank, of two factors each, for every tap."""
    return taps * blocks * tokens * 2 * RANK * (channels + channels // 2)


def mixer(blocks, tokens, channels):
    """A norm, down, depth-wise filters of 7 x 7, a mix, and up."""
    maps = tokens - tokens % 16  # without a class token
    inner = WIDTH * 49 + WIDTH * WIDTH
    return tokens * channels * (4 + 2 * WIDTH) + maps * inner


def inherited(downsampling):
    """The Swin's downsampling once more, of a difference with its norms."""
    norms = 2 * 5 if downsampling == 'difference' else 0
    return 64 * 128 * (64 + norms)


@pytest.mark.parametrize('trunk', STAGES)
@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
@pytest.mark.parametrize('kind, taps', [('E3VA', 2), ('E3VAMix', 1)])
def test_a_side_path_is_counted(trunk, kind, taps, downsampling):
    tuner = dict(type=kind, rank=RANK, downsampling=downsampling)
    stages = STAGES[trunk]
    expected = sum(adapters(taps, *stage) for stage in stages)
    expected += 0 if trunk == 'vit' else inherited(downsampling)
    if kind == 'E3VAMix':
        tuner['width'] = WIDTH
        expected += sum(mixer(*stage) for stage in stages)
    added = count(trunk, **tuner) - count(trunk, type='Frozen')
    assert added == pytest.approx(expected, rel=0.01)


def test_attention_is_counted():
    backbone = build_ours('vit', dict(type='Frozen'))
    found = FlopAnalyzer(backbone, (torch.rand(1, 3, 64, 64),))
    counted = found.by_operator()['scaled_dot_product_attention']
    # Four blocks, 17 tokens: q @ k.mT, and that @ v.
    assert counted == 4 * 2 * 17 * 17 * 32


def test_mona_can_be_counted():
    # It looked its grid up by a size that is another one in a trace.
    trunk = 'swin of mmseg'
    assert count(trunk, type='Mona') > count(trunk, type='Frozen')
