"""Attention in shifted windows and patch merging of frozen Swin blocks."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.products import linear
from e3va_mm.numerics.stored_weights import plain
from e3va_mm.trunks.kernels.layers import cast, compiled
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.stages import Band


class PatchMerging:
    """Patch merging with the values of a token beside each other.

    The stock order, channel by channel, takes a copy that is several times
    slower; here norm and product take their weights in ours.
    """

    def __init__(self, merging: nn.Module, options: TrunkOptions) -> None:
        self.merging = merging  # stock PatchMerging
        self.options = options

    def __call__(
        self, x: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, tuple[int, int]]:
        """(B, H * W, C) -> (B, H' * W', C'), and (H', W')."""
        strides = self.merging.sampler.stride
        size_out = tuple(
            -(-side // stride)
            for side, stride in zip(size, strides, strict=True)
        )
        weight = self.weight()
        with autocast_off(x):
            done = [
                linear(
                    band.gather(x[:, band.tokens]).to(weight.dtype), weight
                ).to(x.dtype)
                for band in self.bands(size, len(x))
            ]
        return torch.cat(done, 1), size_out

    def gather(
        self, tokens: Tensor, size: tuple[int, int], norm: bool = True
    ) -> Tensor:
        """(B, H * W, C) -> (B, H' * W', K * C), K tokens in each patch."""
        merging = self.merging
        (down, across), strides = (
            merging.sampler.kernel_size,
            merging.sampler.stride,
        )
        below, beyond = merging.adap_padding.get_pad_shape(size)
        grid = tokens.unflatten(1, size)
        if below or beyond:
            grid = F.pad(grid, (0, 0, 0, beyond, 0, below))
        if strides == (down, across):
            patches = grid.unflatten(2, (-1, across)).unflatten(1, (-1, down))
            patches = patches.transpose(2, 3)
        else:  # the same, several times slower in backward
            patches = grid.unfold(1, down, strides[0])
            patches = patches.unfold(2, across, strides[1])
            patches = patches.permute(0, 1, 2, 4, 5, 3)
        # (B, H', W', down, across, C)
        gathered = patches.flatten(3).flatten(1, 2)
        if not norm or merging.norm is None:
            return gathered
        weight, bias = (
            self._reordered(p).to(tokens.dtype)
            for p in (merging.norm.weight, merging.norm.bias)
        )
        return F.layer_norm(
            gathered, weight.shape, weight, bias, merging.norm.eps
        )

    def bands(self, size: tuple[int, int], batch: int) -> Iterator[Band]:
        """Rows of patches, some tokens at a time; all if patches overlap."""
        height, width = size
        sampler = self.merging.sampler
        down, across = sampler.stride
        rows = height
        if self.options.chunk and sampler.kernel_size == (down, across):
            rows = self.options.chunk // (batch * width)
            rows = max(down, rows - rows % down)
        patches = -(-width // across)
        for first in range(0, height, rows):
            count = min(rows, height - first)
            before = first // down * patches
            yield Band(
                slice(first * width, (first + count) * width),
                slice(before, before + -(-count // down) * patches),
                partial(self.gather, size=(count, width)),
            )

    def weight(self) -> Tensor:
        """(C', K * C), of the product."""
        weight = plain(self.merging.reduction.weight)
        return self._reordered(weight.to(self.options.dtype(weight)))

    def _reordered(self, weight: Tensor) -> Tensor:
        """(..., C * K) -> (..., K * C)."""
        columns = weight.unflatten(-1, (self.merging.in_channels, -1))
        return columns.transpose(-1, -2).flatten(-2)


class WindowAttention:
    """Shifted window attention, some rows of windows at a time.

    However many windows there are, a shift masks them in at most four ways:
    inside, at the lower edge, at the right edge, in the corner. Each is folded
    into the relative position bias once.
    """

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention  # stock ShiftWindowMSA
        self.options = options

    def __call__(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C) in the compute type."""
        window, shift = self.attention.window_size, self.attention.shift_size
        inner = self.attention.w_msa
        dtype = self.options.dtype(inner.qkv.weight)
        batch, _, channels = query.shape
        height, width = hw_shape
        grid = query.to(dtype).view(batch, height, width, channels)
        grid = F.pad(grid, (0, 0, 0, -width % window, 0, -height % window))
        weights = (*cast(inner.qkv, dtype), *cast(inner.proj, dtype))
        biases = attention_biases(inner, window, shift).to(dtype).contiguous()
        run = compiled(attend, self.options, channels)
        with autocast_off(query):
            if shift:
                grid = grid.roll((-shift, -shift), (1, 2))
            out = torch.empty_like(grid)
            for part, target, kind in self._parts(grid, out, window, shift):
                windows = part.reshape(-1, window * window, channels)
                done = run(windows, *weights, biases[kind], inner.scale)
                target.copy_(done.view(target.shape))
            del grid, part, target  # views keep storages alive
            if shift:
                out = out.roll((shift, shift), (1, 2))
        out = out[:, :height, :width].reshape(batch, -1, channels)
        return self.attention.drop(out)

    def _parts(
        self, grid: Tensor, out: Tensor, window: int, shift: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Windows of one kind, where they go, and the kind.

        Both are views (B, rows, columns, window, window, C).
        """
        source, target = (
            t.unflatten(2, (-1, window))
            .unflatten(1, (-1, window))
            .transpose(2, 3)
            for t in (grid, out)
        )
        batch, rows, columns = source.shape[:3]
        if not shift:
            kinds = [(slice(0, rows), slice(0, columns))]
        else:
            inside, edge = slice(0, rows - 1), slice(rows - 1, rows)
            left, right = slice(0, columns - 1), slice(columns - 1, columns)
            kinds = [
                (inside, left),
                (edge, left),
                (inside, right),
                (edge, right),
            ]
        for kind, (down, across) in enumerate(kinds):
            count = down.stop - down.start
            tokens = batch * (across.stop - across.start) * window**2
            if not count * tokens:
                continue
            step = max(1, (self.options.chunk or count * tokens) // tokens)
            for first in range(down.start, down.stop, step):
                some = slice(first, min(first + step, down.stop))
                yield source[:, some, across], target[:, some, across], kind


def attention_biases(inner: nn.Module, window: int, shift: int) -> Tensor:
    """Relative position bias, with the masks of a shift folded in.

    Args:
        inner (nn.Module): Stock ``WindowMSA`` with ``h`` heads.
        window (int): Side of a window in tokens; ``N = window ** 2``.
        shift (int): Shift in tokens, 0 for none.

    Returns:
        Tensor: (1, h, N, N), or with a shift (4, h, N, N): inside, lower
        edge, right edge, corner.
    """
    index = inner.relative_position_index.view(-1)
    bias = inner.relative_position_bias_table[index]
    bias = bias.view(window**2, window**2, -1).permute(2, 0, 1)[None]
    if not shift:
        return bias
    # At an edge, tokens that came from the opposite one are another region.
    came = torch.arange(window, device=bias.device) >= window - shift
    below, beyond = came.repeat_interleave(window), came.repeat(window)
    nowhere = torch.zeros_like(below)
    regions = torch.stack([nowhere, below, beyond, below + 2 * beyond])
    apart = regions[:, :, None] != regions[:, None, :]
    # -100 rather than minus infinity, as the stock code has it.
    return bias + apart[:, None].to(bias.dtype) * -100.0


def attend(
    windows: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    scale: float,
) -> Tensor:
    """(n, N, C) -> (n, N, C): attention inside each window.

    ``bias`` (h, N, N) is added before the softmax.
    """
    heads = len(bias)
    qkv = linear(windows, qkv_weight, qkv_bias)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[None], scale=scale
    )
    return linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)
