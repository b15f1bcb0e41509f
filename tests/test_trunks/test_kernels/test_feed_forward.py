"""Linear layers, gated feed-forward parts and what stays in fp32."""

import copy

import pytest
import torch
from e3va_mm.trunks.kernels.feed_forward import (
    GatedFeedForward,
    Product,
    Wide,
    install,
)
from torch import nn

from e3va_mm.measure import LiveBytes
from e3va_mm.trunks import TrunkOptions

C, HIDDEN, TOKENS = 16, 48, 40


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


def gated(**kwargs):
    utils = pytest.importorskip('mmpretrain.models.utils')
    return utils.SwiGLUFFN(C, HIDDEN, layer_scale_init_value=0.5, **kwargs)


@pytest.mark.parametrize('chunk', [None, 1, 7, 1000])
@pytest.mark.parametrize(
    'kwargs',
    [{}, dict(norm_cfg=dict(type='LN')), dict(add_identity=False)],
    ids=str,
)
def test_a_gated_part_equals_the_stock_one(kwargs, chunk):
    stock = gated(**kwargs).eval()
    ours = copy.deepcopy(stock)
    install(ours, GatedFeedForward, TrunkOptions(chunk=chunk))
    x, identity = torch.randn(2, 2, TOKENS, C)
    with torch.no_grad():
        for args in ((x,), (x, identity)):
            torch.testing.assert_close(ours(*args), stock(*args))


def test_its_hidden_layer_is_never_there_as_a_whole():
    x = torch.randn(2, TOKENS, C)
    peaks = {}
    for chunk in (None, 4):
        ours = gated().eval()
        install(ours, GatedFeedForward, TrunkOptions(chunk=chunk))
        with torch.no_grad(), LiveBytes() as count:
            ours(x)
        peaks[chunk] = count.peak
    whole = 4 * 2 * TOKENS * 2 * HIDDEN
    assert peaks[None] - peaks[4] > 0.9 * whole


def test_what_is_wide_ignores_autocast():
    conv = nn.Conv2d(3, 4, 2)
    install(conv, Wide, TrunkOptions())
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert conv(x).dtype is torch.float32
        assert nn.Conv2d(3, 4, 2)(x).dtype is torch.bfloat16
