"""Attention of ViT blocks equals that of the stock modules."""

import copy

import pytest
import torch
from torch import nn

from e3va_mm.measure import LiveBytes
from e3va_mm.trunks import TrunkOptions
from e3va_mm.trunks.kernels import KERNELS, attention, kernel_of
from e3va_mm.trunks.kernels.layers import install

pytest.importorskip('mmpretrain')

C, HEADS, GRID = 32, 4, (6, 6)
N = GRID[0] * GRID[1] + 1


def plain():
    from mmpretrain.models.utils import MultiheadAttention

    module = MultiheadAttention(C, HEADS, layer_scale_init_value=0.5)
    return module, (torch.randn(2, N, C),)


def beit(shared=False, bias='qv_bias'):
    from mmpretrain.models.utils import BEiTAttention

    module = BEiTAttention(C, HEADS, GRID, not shared, bias=bias)
    extra = (torch.randn(HEADS, N, N),) if shared else ()
    return module, (torch.randn(2, N, C), *extra)


def beit_of_mmseg():
    from mmseg.models.backbones.beit import BEiTAttention

    return BEiTAttention(C, HEADS, GRID), (torch.randn(2, N, C),)


def rotary(with_cls_token=True):
    from mmpretrain.models.backbones.vit_eva02 import AttentionWithRoPE
    from mmpretrain.models.utils import RotaryEmbeddingFast

    rope = RotaryEmbeddingFast(C // HEADS, GRID)
    module = AttentionWithRoPE(
        C, HEADS, rope=rope, with_cls_token=with_cls_token
    )
    return module, (torch.randn(2, N - 1 + with_cls_token, C), GRID)


def decomposed(size=GRID, positions=True):
    from mmpretrain.models.backbones.vit_sam import Attention

    module = Attention(C, HEADS, use_rel_pos=positions, input_size=(4, 5))
    return module, (torch.randn(2, *size, C),)


def cross(bias=True):
    module = nn.MultiheadAttention(C, HEADS, bias=bias)
    key = torch.randn(9, 2, C)
    return module, (torch.randn(N, 2, C), key, key + 1)


CASES = {
    'plain': plain,
    'beit': beit,
    'beit, whole bias': lambda: beit(bias=True),
    'beit, no bias': lambda: beit(bias=False),
    'beit, shared table': lambda: beit(shared=True),
    'mmseg beit': beit_of_mmseg,
    'rotary': rotary,
    'rotary, no class token': lambda: rotary(False),
    'decomposed': decomposed,
    'decomposed, across': lambda: decomposed((3, 8)),
    'decomposed, none': lambda: decomposed(positions=False),
    'cross': cross,
    'cross, no bias': lambda: cross(False),
}


def built(name, options=None):
    """A stock module of drawn weights, a copy by its kernel, and inputs."""
    stock, inputs = CASES[name]()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.3)
    stock.eval()
    ours = copy.deepcopy(stock)
    kind = kernel_of(ours)
    assert kind in KERNELS.values()
    install(ours, kind, options or TrunkOptions())
    return stock, ours, inputs


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize('compute', [None, 'bf16', 'fp16'])
@pytest.mark.parametrize('name', CASES)
def test_it_equals_the_stock_module(name, compute):
    stock, ours, inputs = built(name, TrunkOptions(compute=compute))
    with torch.no_grad():
        got, expected = first(ours(*inputs)), first(stock(*inputs))
    if compute is None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        error = (got - expected).norm() / expected.norm()
        assert 1e-6 < error < 2e-2


@pytest.mark.parametrize('name', ['beit', 'mmseg beit', 'decomposed'])
def test_a_position_bias_is_never_there_as_a_whole(name, monkeypatch):
    stock, ours, inputs = built(name)
    monkeypatch.setattr(attention, 'BIAS_VALUES', 2 * HEADS * N * 2)
    peaks = []
    for module in (stock, ours):
        with torch.no_grad(), LiveBytes() as count:
            module(*inputs)
        peaks.append(count.peak)
    assert peaks[1] < peaks[0] - 4 * HEADS * N * N


def test_masks_are_left_to_the_stock_module():
    stock, ours, inputs = built('cross')
    mask = torch.rand(N, 9) > 0.5
    mask[:, 0] = False
    with torch.no_grad():
        got, _ = ours(*inputs, attn_mask=mask)
        expected, _ = stock(*inputs, attn_mask=mask)
    torch.testing.assert_close(got, expected)


def test_a_subclass_with_a_forward_of_its_own_has_no_kernel():
    class Other(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query, None

    assert kernel_of(Other(C, HEADS)) is None
    # One without is the same thing.
    from mmseg.models.backbones.mae import MAEAttention

    mae = MAEAttention(C, HEADS, GRID)
    assert kernel_of(mae) is attention.RelativeAttention
