"""Frozen Swin blocks compute what the stock blocks compute."""

import copy
import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from e3va_mm.measure import LiveBytes
from e3va_mm.trunks import TrunkOptions
from e3va_mm.trunks.kernels.layers import FeedForward, install
from e3va_mm.trunks.kernels.window_attention import (
    PatchMerging,
    WindowAttention,
)
from e3va_mm.trunks.kernels.windows import relative_positions, shift_masks
from tests.helpers import e3va_and_stock

C, HEADS = 16, 4
FLOAT = 4  # bytes


def drawn(module):
    """Weights that let attention choose: a wrong mask or bias shows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if 'weight' in name else 1
            parameter.normal_(std=fan_in**-0.5)
            if 'norm' in name and name.endswith('weight'):
                parameter.add_(1)
    return module.eval()


def frozen(module, **options):
    """A copy that computes by the kernels."""
    module, options = copy.deepcopy(module), TrunkOptions(**options)
    if hasattr(module, 'attn'):
        install(module.attn, WindowAttention, options)
        install(module.ffn.layers, FeedForward, options)
    else:
        install(module, PatchMerging, options)
    return module


def block(scope='mmdet', window=7, shift=True, channels=C, **kwargs):
    stock = importlib.import_module(f'{scope}.models.backbones.swin')
    return drawn(
        stock.SwinBlock(
            channels,
            HEADS,
            4 * channels,
            window_size=window,
            shift=shift,
            **kwargs,
        )
    )


def merging(scope='mmdet', channels=C, **kwargs):
    stock = importlib.import_module(f'{scope}.models.backbones.swin')
    return drawn(stock.PatchMerging(channels, 2 * channels, **kwargs))


def assert_same(ours, stock, size, batch=2):
    """Within 1e-5 in single precision, and in the residual stream's type."""
    tokens = torch.randn(batch, size[0] * size[1], C)
    before = tokens.clone()
    with torch.no_grad():
        got, expected = ours(tokens, size), stock(tokens, size)
    assert torch.equal(tokens, before)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('chunk', [None, 101])
@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('window', [7, 5])
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_a_block_equals_the_stock_block(scope, window, shift, chunk):
    stock = block(scope, window, shift)
    ours = frozen(stock, chunk=chunk)
    # Exactly one window, a row, a column, several; padded and tiny ones.
    for height, width in (
        (window, window),
        (window, 3 * window),
        (3 * window, window),
        (2 * window - 1, 3 * window + 1),
        (window - 1, 2 * window + 3),
        (1, 1),
    ):
        assert_same(ours, stock, (height, width))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    window=st.integers(1, 6),
    shift=st.booleans(),
    batch=st.integers(1, 3),
    chunk=st.none() | st.integers(1, 500),
)
def test_at_any_size(height, width, window, shift, batch, chunk):
    stock = block(window=window, shift=shift)
    assert_same(frozen(stock, chunk=chunk), stock, (height, width), batch)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(qk_scale=0.9),
        dict(qkv_bias=False),
        dict(act_cfg=dict(type='ReLU', inplace=True)),
        dict(norm_cfg=dict(type='LN', eps=1e-2)),
        dict(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5),
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_of_the_stock_block(kwargs):
    stock = block(**kwargs)
    assert_same(frozen(stock), stock, (9, 11))


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('norm_cfg', [dict(type='LN', eps=1e-3), None])
def test_merging_equals_the_stock_merging(scope, stride, norm_cfg):
    stock = merging(scope, stride=stride, norm_cfg=norm_cfg)
    ours = frozen(stock)
    for size in ((8, 6), (7, 5), (8, 5), (1, 1), (1, 6), (3, 1)):
        assert_same(ours, stock, size)


@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('chunk', [None, 1, 30, 60])
@pytest.mark.parametrize('size', [(7, 5), (8, 6), (1, 3)])
def test_bands_are_the_whole_in_order(stride, chunk, size):
    kernel = PatchMerging(merging(stride=stride), TrunkOptions(chunk=chunk))
    tokens = torch.randn(2, size[0] * size[1], C)
    bands = list(kernel.bands(size, len(tokens)))
    # Patches of a side of 2 that overlap, or leave gaps, need their rows.
    if stride != 2 or chunk is None:  # 8192 tokens
        assert len(bands) == 1
    whole = kernel.gather(tokens, size)
    parts = [band.gather(tokens[:, band.tokens]) for band in bands]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    for band, part in zip(bands, parts, strict=True):
        torch.testing.assert_close(part, whole[:, band.patches])
    assert sum(b.tokens.stop - b.tokens.start for b in bands) == len(tokens[0])
    if stride == 2 and chunk == 30 and size == (8, 6):
        # 30 tokens are two rows of both images.
        assert [b.tokens.stop for b in bands] == [12, 24, 36, 48]


@pytest.mark.parametrize('stride', [2, 3])
@pytest.mark.parametrize('norm', [True, False])
def test_gradients_through_the_gathering_equal_the_stock_ones(stride, norm):
    """The inherited downsampling of the highway goes back through it."""
    stock = merging(stride=stride)
    size = 7, 5
    tokens = torch.randn(2, 35, C, requires_grad=True)
    kernel = PatchMerging(stock, TrunkOptions())
    got = F.linear(kernel.gather(tokens, size, norm), kernel.weight())
    if not norm:
        stock.norm = None
    expected, _ = stock(tokens, size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, tokens, grad),
        torch.autograd.grad(expected, tokens, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'scope, chunk, kwargs',
    [
        ('mmdet', None, dict()),
        ('mmseg', 333, dict()),
        ('mmdet', 1, dict(window_size=5)),
        ('mmdet', 333, dict(qkv_bias=False, qk_scale=0.4)),
        ('mmseg', 333, dict(strides=(4, 3, 1, 2))),
        ('mmdet', 333, dict(patch_norm=False)),
    ],
)
def test_a_backbone_equals_the_stock_one(scope, chunk, kwargs):
    ours, stock = e3va_and_stock(
        scope, stock_kwargs=kwargs, tuner=dict(trunk_chunk=chunk)
    )
    for size in ((101, 75), (28, 28), (13, 140)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            for a, b in zip(ours(image), stock(image), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def stock_mask(window, shift, rows, columns):
    """(rows, columns, N, N): who may not attend to whom, by coordinates."""
    side = torch.arange(window)
    at = torch.cartesian_prod(side, side)  # of the tokens of a window
    mask = torch.zeros(rows, columns, window**2, window**2)
    height, width = rows * window, columns * window
    for row in range(rows):
        for column in range(columns):
            # Where in the image the tokens of the window come from.
            y = at[:, 0] + row * window + shift
            x = at[:, 1] + column * window + shift
            wrapped = (y >= height).long() + 2 * (x >= width).long()
            apart = wrapped[:, None] != wrapped[None]
            mask[row, column][apart] = -100.0
    return mask


@pytest.mark.parametrize('window', [7, 5, 4, 2])
def test_relative_positions_are_those_of_the_stock_code(window):
    stock = block(window=window).attn.w_msa.relative_position_index
    assert (relative_positions(window)[:, : window**2] == stock.numpy()).all()


@pytest.mark.parametrize('window, shift', [(7, 3), (5, 2), (4, 2), (2, 1)])
def test_a_shift_masks_in_four_ways(window, shift):
    masks = torch.from_numpy(shift_masks(window, shift))[..., : window**2]
    expected = stock_mask(window, shift, 3, 3)
    for row in range(3):
        for column in range(3):
            kind = int(row == 2) + 2 * int(column == 2)
            assert torch.equal(masks[kind, 0], expected[row, column])


@pytest.mark.parametrize('shift', [False, True])
def test_only_windows_at_an_edge_have_masks_of_their_own(shift, monkeypatch):
    ours = frozen(block(shift=shift), chunk=10**9)
    masks = []

    def attend(q, k, v, attn_mask, scale):
        masks.append((len(q), attn_mask.untyped_storage().nbytes()))
        return v.clone()

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attend)
    one = HEADS * 49 * 56 * FLOAT  # 56 is 49, aligned
    for rows, columns in ((2, 2), (5, 6)):
        masks.clear()
        with torch.no_grad():
            ours.attn(
                torch.randn(1, rows * columns * 49, C),
                (7 * rows, 7 * columns),
            )
        inside = (rows - 1) * (columns - 1) if shift else rows * columns
        edge = rows * columns - inside
        assert masks == [(inside, one)] + [(edge, edge * one)] * shift


def peak_of(function, *args):
    """Bytes at the worst moment, besides what there was before."""
    with torch.no_grad(), LiveBytes() as count:
        before = sum(
            arg.nbytes for arg in args if isinstance(arg, torch.Tensor)
        )
        function(*args)
    return count.peak - before


@pytest.mark.parametrize('size', [(56, 70), (53, 66)])
@pytest.mark.parametrize('shift', [False, True])
def test_accounted_peak_of_attention_by_arithmetic(shift, size, monkeypatch):
    rows, columns, side, channels = 8, 10, 49, 4 * C
    stock = block(shift=shift, channels=channels)
    ours = frozen(stock, chunk=1)
    # The order of the windows is kept.
    ours.attn(torch.zeros(1, size[0] * size[1], channels), size)
    tokens = torch.randn(1, size[0] * size[1], channels)
    grid = rows * columns * side * channels * FLOAT  # padded
    scores = rows * columns * HEADS * side * side * FLOAT
    # Scores, and beside them their softmax.
    assert peak_of(stock.attn, tokens, size) >= 2 * scores
    # The kernel: two grids, windows and tokens; weights; the bias; a window
    # with q, k, v, two more, and its mask with the bias; and what is kept,
    # two indices and the masks.
    weights = sum(p.nbytes for p in ours.attn.parameters())
    one = (6 * side * channels + HEADS * side * 56) * FLOAT
    most = 2 * grid + weights + HEADS * side * 56 * FLOAT + one
    edge = shift * (rows + columns - 1)
    most += 2 * FLOAT * rows * columns * side + edge * side * 56 * FLOAT
    # Where attention is no single kernel, the scores of that window.
    with_scores = most + 3 * scores // (rows * columns)
    assert peak_of(ours.attn, tokens, size) <= with_scores < 2 * scores
    monkeypatch.setattr(
        F, 'scaled_dot_product_attention', lambda q, k, v, **_: v.clone()
    )
    assert peak_of(ours.attn, tokens, size) <= most


@pytest.mark.parametrize('how', ['in place', 'data', 'replaced', 'loaded'])
@pytest.mark.parametrize(
    'name',
    [
        'attn.w_msa.qkv.weight',
        'attn.w_msa.proj.bias',
        'attn.w_msa.relative_position_bias_table',
        'ffn.layers.0.0.weight',
        'norm1.weight',
        'norm.weight',
        'reduction.weight',
    ],
)
def test_changed_weights_count_at_once(name, how):
    """Nothing that is made from weights outlives a forward pass."""
    stock = merging() if name.count('.') == 1 and '1' not in name else block()
    ours = frozen(stock)
    assert_same(ours, stock, (9, 11))
    path, leaf = name.rsplit('.', 1)
    new = -1.5 * stock.get_parameter(name).detach()
    for module in (stock, ours):
        parameter = module.get_parameter(name)
        if how == 'in place':
            parameter.data.copy_(new)
        elif how == 'data':
            parameter.data = new.clone()
        elif how == 'replaced':
            owner = module.get_submodule(path)
            setattr(owner, leaf, nn.Parameter(new.clone()))
        else:
            module.load_state_dict({**module.state_dict(), name: new})
    assert_same(ours, stock, (9, 11))


def test_a_copy_computes_with_its_own_weights():
    ours, stock = e3va_and_stock()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = ours(image)
        twin = copy.deepcopy(ours)
        for module in (stock, twin):
            for parameter in module.stages.parameters():
                parameter.mul_(-1.5)
        expected = stock(image)
        for output, target in zip(twin(image), expected, strict=True):
            torch.testing.assert_close(output, target, rtol=0, atol=1e-5)
        for output, target in zip(ours(image), before, strict=True):
            assert torch.equal(output, target)
    assert not torch.allclose(expected[0], before[0], atol=1e-2)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a compiler')
def test_a_compiled_block_computes_the_same():
    stock = block(window=3, shift=False)
    ours = frozen(stock, compile=True)
    for size in ((6, 6), (9, 4)):
        assert_same(ours, stock, size)
