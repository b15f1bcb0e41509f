"""Reading a stock Swin block by block."""

import pytest
import torch

from e3va_mm.trunks import StageSpec, SwinTrunk
from tests.helpers import build_stock, randomised
from tests.reference.e3va import merge


@pytest.fixture
def stock():
    backbone = randomised(build_stock())
    backbone.eval()
    return backbone


def test_stages(stock):
    assert SwinTrunk().stages(stock) == [
        StageSpec(32 * 2**i, depth, ('attn', 'ffn'))
        for i, depth in enumerate((2, 1, 2, 1))
    ]


def test_taps_are_what_the_blocks_add_to_their_residuals(stock):
    trunk = SwinTrunk()
    seen = []
    with torch.no_grad():
        tokens, size = trunk.embed(stock, torch.randn(2, 3, 50, 70))
        end, *_ = trunk.run_stage(
            stock,
            0,
            tokens,
            size,
            ('attn', 'ffn'),
            lambda *tap: seen.append(tap),
        )
    assert [tap[:2] for tap in seen] == [
        (0, 'attn'),
        (0, 'ffn'),
        (1, 'attn'),
        (1, 'ffn'),
    ]
    torch.testing.assert_close(
        tokens + sum(value for *_, value in seen), end.tokens
    )


def test_hooks_are_gone_after_a_stage_even_if_it_fails(stock):

    def fail(*tap):
        raise RuntimeError('on purpose')

    trunk = SwinTrunk()
    tokens, size = trunk.embed(stock, torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match='on purpose'):
        trunk.run_stage(stock, 0, tokens, size, ('ffn',), fail)
    assert not any(module._forward_hooks for module in stock.modules())


@pytest.mark.parametrize('size', [(7, 5), (8, 6)])
@pytest.mark.parametrize('linear', [False, True])
def test_downsampling_equals_merging_by_slices(stock, size, linear):
    tokens = torch.randn(2, size[0] * size[1], 32)
    trunk = SwinTrunk()
    trunk.prepare(stock)
    gather, weight, _ = trunk.downsampling(stock, 0, size)
    got = gather(tokens, norm=not linear) @ weight().T
    expected, _ = merge(
        tokens, size, stock.stages[0].downsample, norm=not linear
    )
    torch.testing.assert_close(got, expected)
