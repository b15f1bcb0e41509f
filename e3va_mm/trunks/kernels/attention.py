"""Attention among all tokens of frozen ViT blocks, over the stock modules.

One class for each way in which the stock classes compute queries, keys and
what is added before the softmax. A position bias differs from query to query:
it is made for some queries at a time and never there as a whole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.products import linear
from e3va_mm.trunks.kernels.layers import cast, compiled
from e3va_mm.trunks.kernels.rotary import rotation
from e3va_mm.trunks.options import TrunkOptions

# Values of a position bias that may be there at once: 32 MiB in fp32.
BIAS_VALUES = 2**23


class SelfAttention:
    """``MultiheadAttention`` of mmpretrain, layer scale included."""

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention
        self.options = options

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        attention = self.attention
        dtype = self.options.dtype(attention.qkv.weight)
        run = compiled(attend_all, self.options, x.shape[-1])
        with autocast_off(x):
            out = run(
                x.to(dtype),
                *cast(attention.qkv, dtype),
                *cast(attention.proj, dtype),
                attention.num_heads,
            )
            return attention.out_drop(attention.gamma1(out))


class CrossAttention:
    """``nn.MultiheadAttention`` without masks, as stock blocks call it."""

    def __init__(
        self, attention: nn.MultiheadAttention, options: TrunkOptions
    ) -> None:
        self.attention = attention
        self.stock = attention.forward
        self.options = options

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, **kwargs
    ) -> tuple[Tensor, None]:
        """(L, B, C), (S, B, C), (S, B, C) -> (L, B, C)."""
        attention = self.attention
        masks = [v for v in kwargs.values() if isinstance(v, Tensor)]
        if masks or attention.batch_first or attention.in_proj_weight is None:
            return self.stock(query, key, value, **kwargs)
        dtype = self.options.dtype(attention.out_proj.weight)
        weights = attention.in_proj_weight.to(dtype).chunk(3)
        biases = (None,) * 3
        if attention.in_proj_bias is not None:
            biases = attention.in_proj_bias.to(dtype).chunk(3)
        with autocast_off(query):
            q, k, v = (
                linear(part.transpose(0, 1).to(dtype), weight, bias)
                .unflatten(2, (attention.num_heads, -1))
                .transpose(1, 2)
                for part, weight, bias in zip(
                    (query, key, value), weights, biases, strict=True
                )
            )
            out = F.scaled_dot_product_attention(q, k, v)
            out = linear(
                out.transpose(1, 2).flatten(2),
                *cast(attention.out_proj, dtype),
            )
        return out.transpose(0, 1), None


class RelativeAttention:
    """``BEiTAttention`` of mmpretrain and mmseg, also that of MAE."""

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention
        self.options = options

    def __call__(
        self, x: Tensor, rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        """(B, N, C), bias (heads, N, N) shared by all blocks -> (B, N, C)."""
        attention = self.attention
        dtype = self.options.dtype(attention.qkv.weight)
        weight, bias = cast(attention.qkv, dtype)
        if attention.bias == 'qv_bias':
            bias = torch.cat(
                (
                    attention.q_bias,
                    torch.zeros_like(attention.v_bias),
                    attention.v_bias,
                )
            ).to(dtype)
        with autocast_off(x):
            q, k, v = split_heads(
                linear(x.to(dtype), weight, bias), attention.num_heads
            )
            out = attend_in_parts(
                q,
                k,
                v,
                lambda rows: self._bias(rows, rel_pos_bias),
                attention.scale,
            )
            return linear(merge_heads(out), *cast(attention.proj, dtype))

    def _bias(self, rows: slice, shared: Tensor | None) -> Tensor | None:
        """(1, heads, n, N) of some queries."""
        attention = self.attention
        bias = None
        if attention.relative_position_bias_table is not None:
            index = attention.relative_position_index[rows]
            bias = attention.relative_position_bias_table[index.flatten()]
            bias = bias.view(*index.shape, -1).permute(2, 0, 1)
        if shared is not None:
            shared = shared[:, rows]
            bias = shared if bias is None else bias + shared
        return None if bias is None else bias[None]


class RotaryAttention:
    """``AttentionWithRoPE`` of mmpretrain's EVA-02."""

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention
        self.options = options

    def __call__(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """(B, N, C) and the grid of the tokens -> (B, N, C)."""
        attention = self.attention
        dtype = self.options.dtype(attention.qkv.weight)
        with autocast_off(x):
            q, k, v = split_heads(
                linear(x.to(dtype), *cast(attention.qkv, dtype)),
                attention.num_heads,
            )
            if attention.rope is not None:
                cos, sin = rotation(attention.rope, patch_resolution)
                q, k = (self._rotate(part, cos, sin) for part in (q, k))
            out = F.scaled_dot_product_attention(
                q, k, v, scale=attention.scale
            )
            return linear(merge_heads(out), *cast(attention.proj, dtype))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, heads, N, d) -> the same; the class token stays."""
        first = int(self.attention.with_cls_token)
        turned = x[:, :, first:].float()
        pairs = turned.unflatten(-1, (-1, 2))
        quarter = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
        turned = (turned * cos + quarter * sin).to(x.dtype)
        return torch.cat((x[:, :, :first], turned), 2)


class DecomposedAttention:
    """``Attention`` of mmpretrain's ViTSAM, in windows or over all tokens."""

    def __init__(self, attention: nn.Module, options: TrunkOptions) -> None:
        self.attention = attention
        self.options = options

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attention = self.attention
        size = x.shape[1:3]
        dtype = self.options.dtype(attention.qkv.weight)
        with autocast_off(x):
            q, k, v = split_heads(
                linear(x.flatten(1, 2).to(dtype), *cast(attention.qkv, dtype)),
                attention.num_heads,
            )
            bias = None
            if attention.use_rel_pos:
                down, across = (
                    relative_positions(table, side).to(dtype)
                    for table, side in zip(
                        (attention.rel_pos_h, attention.rel_pos_w),
                        size,
                        strict=True,
                    )
                )

                def bias(rows: slice) -> Tensor:
                    tokens = torch.arange(size[0] * size[1], device=q.device)
                    tokens, part = tokens[rows], q[:, :, rows]
                    y = down[tokens // size[1]]  # (n, H, d)
                    x = across[tokens % size[1]]  # (n, W, d)
                    y = torch.einsum('bhnd,nkd->bhnk', part, y)
                    x = torch.einsum('bhnd,nkd->bhnk', part, x)
                    return (y[..., None] + x[..., None, :]).flatten(3)

            out = attend_in_parts(q, k, v, bias, attention.scale)
            out = linear(merge_heads(out), *cast(attention.proj, dtype))
            return out.unflatten(1, size)


def attend_all(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
) -> Tensor:
    """(B, N, C) -> (B, N, C): attention without a bias."""
    q, k, v = split_heads(linear(x, qkv_weight, qkv_bias), heads)
    out = F.scaled_dot_product_attention(q, k, v)
    return linear(merge_heads(out), proj_weight, proj_bias)


def attend_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Callable[[slice], Tensor | None] | None,
    scale: float,
) -> Tensor:
    """Attention with a bias that is made for some queries at a time.

    Args:
        q (Tensor): (B, heads, N, d).
        k (Tensor): (B, heads, N, d).
        v (Tensor): (B, heads, N, d).
        bias (Callable, optional): Some queries -> (B or 1, heads, n, N).
        scale (float): Of the products.

    Returns:
        Tensor: (B, heads, N, d).
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    batch, heads, tokens, _ = q.shape
    step = max(1, BIAS_VALUES // (batch * heads * tokens))
    parts = []
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        mask = bias(rows)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, rows],
                k,
                v,
                attn_mask=None if mask is None else mask.to(q.dtype),
                scale=scale,
            )
        )
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def relative_positions(table: Tensor, side: int) -> Tensor:
    """(2 S - 1, d), one for each distance -> (side, side, d) by position.

    A table for another side is interpolated, as the stock code does it.
    """
    distances = 2 * side - 1
    if len(table) != distances:
        table = F.interpolate(table.t()[None], size=distances, mode='linear')[
            0
        ].t()
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 C) -> three of (B, heads, N, C / heads)."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def merge_heads(out: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, C)."""
    return out.transpose(1, 2).flatten(2)
