"""Attention in shifted windows and patch merging of frozen Swin blocks."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.products import linear
from e3va_mm.numerics.stored_weights import plain
from e3va_mm.trunks.kernels.layers import cast, compiled, joined
from e3va_mm.trunks.kernels.windows import window_order
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
        whole = torch.cat(done, 1) if len(done) > 1 else done[0]
        return whole, size_out

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
            self._reordered(p, tokens.dtype)
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
        if sampler.kernel_size == (down, across):
            weight = self.merging.reduction.weight
            # Padded, gathered, normalised and cast, at most.
            token = 16 * self.merging.in_channels
            rows = self.options.at_once(token, weight.device)
            rows //= batch * width
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
        return self._reordered(weight, self.options.dtype(weight))

    def _reordered(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., C * K) -> (..., K * C) in ``dtype``, a copy."""
        columns = weight.unflatten(-1, (self.merging.in_channels, -1))
        columns = columns.transpose(-1, -2)
        return columns.to(
            dtype, memory_format=torch.contiguous_format, copy=True
        ).flatten(-2)


class WindowAttention:
    """Shifted window attention, some windows at a time.

    A shift masks windows at the lower and right edge. They come last, and
    each has the relative position bias with its mask added.
    """

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention  # stock ShiftWindowMSA
        self.options = options

    def __call__(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C) in the compute type."""
        inner = self.attention.w_msa
        window, shift = self.attention.window_size, self.attention.shift_size
        dtype = self.options.dtype(inner.qkv.weight)
        batch, _, channels = query.shape
        # Tokens, q, k, v, two outputs and one more; masks.
        token = (7 * channels + inner.num_heads * window**2) * dtype.itemsize
        order = window_order(
            batch,
            tuple(hw_shape),
            window,
            shift,
            self.options.at_once(token, query.device),
            dtype,
            query.device,
        )
        run = compiled(attend, self.options, channels)
        with autocast_off(query):
            tokens = query.flatten(0, 1).to(dtype)
            table = inner.relative_position_bias_table.t().to(dtype)
            bias = table.index_select(1, order.bias)
            arguments = (
                *cast(inner.qkv, dtype),
                *cast(inner.proj, dtype),
                bias.view(inner.num_heads, window**2, -1),
                inner.scale,
            )
            out = joined(
                (
                    run(some.of(tokens), some.inside, some.masks, *arguments)
                    for some in order.parts
                ),
                order.length,
            )
            del tokens
            out = out.index_select(0, order.back)
        return self.attention.drop(out.view(batch, -1, channels))


def attend(
    tokens: Tensor,
    inside: int,
    masks: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    scale: float,
) -> Tensor:
    """(n * N, C) -> (n * N, C): attention inside each window.

    ``bias`` (h, N, N') is added before the softmax, and ``masks``
    (n - inside, 1, N, N') in the last windows; columns past N mean nothing.
    """
    heads, length, _ = bias.shape
    qkv = linear(tokens, qkv_weight, qkv_bias)
    qkv = qkv.view(-1, length, 3, heads, tokens.shape[1] // heads)
    qkv = qkv.permute(2, 0, 3, 1, 4)
    if masks is None:
        parts = [(qkv, bias[None])]
    else:
        parts = [(qkv[:, inside:], bias + masks)]
        if inside:
            parts.insert(0, (qkv[:, :inside], bias[None]))
    done = [
        F.scaled_dot_product_attention(
            *part.unbind(), attn_mask=added[..., :length], scale=scale
        ).transpose(1, 2)
        for part, added in parts
    ]
    out = torch.cat(done) if len(done) > 1 else done[0]
    return linear(out.reshape(len(tokens), -1), proj_weight, proj_bias)
