"""Linear layers, MLPs and what stays in single precision."""

import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import nn

from e3va_mm.measure import LiveBytes
from e3va_mm.trunks import TrunkOptions
from e3va_mm.trunks.kernels import layers
from e3va_mm.trunks.kernels.layers import (
    FeedForward,
    FullPrecision,
    GatedFeedForward,
    Product,
    install,
)

C, HIDDEN, TOKENS = 16, 48, 40


def gated(**kwargs):
    utils = pytest.importorskip('mmpretrain.models.utils')
    return utils.SwiGLUFFN(
        C, HIDDEN, layer_scale_init_value=0.5, **kwargs
    ).eval()


def simple():
    ffn = FFN(C, HIDDEN, ffn_drop=0.5, act_cfg=dict(type='GELU'))
    return ffn.eval().layers


def pair(stock, kind, **options):
    ours = copy.deepcopy(stock)
    install(ours, kind, TrunkOptions(**options))
    return stock, ours


@pytest.mark.parametrize('compute', [None, 'fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16])
def test_a_linear_layer_in_the_type_asked_for(compute, stored):
    stock = nn.Linear(C, HIDDEN)
    ours = copy.deepcopy(stock).to(stored)
    install(ours, Product, TrunkOptions(compute=compute))
    x = torch.randn(2, TOKENS, C)
    with torch.no_grad():
        got = ours(x)
    names = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    assert got.dtype is names.get(compute, stored)
    torch.testing.assert_close(got.float(), stock(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('chunk', [None, 1, 7, 1000])
@pytest.mark.parametrize(
    'make',
    [
        simple,
        gated,
        lambda: gated(norm_cfg=dict(type='LN')),
        lambda: gated(add_identity=False),
    ],
)
def test_an_mlp_equals_the_stock_one(make, chunk):
    stock = make()
    plain = isinstance(stock, nn.Sequential)
    kind = FeedForward if plain else GatedFeedForward
    stock, ours = pair(stock, kind, chunk=chunk)
    x, identity = torch.randn(2, 2, TOKENS, C)
    before = x.clone()
    with torch.no_grad():
        for args in ((x,), *(() if plain else ((x, identity),))):
            torch.testing.assert_close(ours(*args), stock(*args))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    'make, kind, hidden',
    [(simple, FeedForward, HIDDEN), (gated, GatedFeedForward, 2 * HIDDEN)],
)
def test_its_hidden_layer_is_never_there_as_a_whole(make, kind, hidden):
    x = torch.randn(2, TOKENS, C)
    peaks = {}
    for chunk in (None, 4):
        _, ours = pair(make(), kind, chunk=chunk)
        with torch.no_grad(), LiveBytes() as count:
            ours(x)
        peaks[chunk] = count.peak
    assert peaks[None] - peaks[4] > 0.9 * 4 * 2 * TOKENS * hidden


def test_full_precision_ignores_autocast():
    stock, ours = pair(nn.Conv2d(3, 4, 2), FullPrecision)
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert ours(x).dtype is torch.float32
        assert stock(x).dtype is torch.bfloat16


def test_only_what_is_asked_for_is_compiled(monkeypatch):
    asked = []

    def fake(function, **kwargs):
        asked.append(function.__name__)
        return function

    monkeypatch.setattr(torch, 'compile', fake)
    # What is compiled is remembered, by other tests too.
    layers._compiled.cache_clear()
    for flag, names in ((False, []), (True, [f'feed_forward_{C}'])):
        stock, ours = pair(simple(), FeedForward, compile=flag)
        x = torch.randn(2, 5, C)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), stock(x))
        assert asked == names
    layers._compiled.cache_clear()  # it holds the fakes
