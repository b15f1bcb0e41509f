"""The sum of trunk and highway at a stage's end, and who reads it.

Output norm and inherited downsampling both need ``s = x + h`` in backward.
Neither keeps it: it comes back from the norm's own output, which the neck
keeps anyway, and the downsampling is computed again from it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from e3va_mm.numerics.autocast import autocast_dtype, autocast_off
from e3va_mm.numerics.products import linear, wide_dtype
from e3va_mm.trunks import Band, Downsampling
from e3va_mm.tuners.e3va.kept_taps import ExactTaps, TapCodec

# By the type of the output: the largest |bias| / |weight| and the smallest
# |weight| of a norm whose input comes back well from its output.
INVERTIBLE = {
    torch.float64: (2.0**20, 1e-100),
    torch.float32: (2.0**8, 1e-20),
    torch.bfloat16: (2.0**3, 1e-20),
    torch.float16: (2.0**3, 1e-2),
}


class KeptSum(NamedTuple):
    """What is kept of a stage's sum, and the way back to it."""

    tensors: tuple[Tensor, ...]
    restore: Callable[[Sequence[Tensor]], Tensor]  # -> (B, L, C)


def keep(total: Tensor, codec: TapCodec | None = None) -> KeptSum:
    """Keep a sum (B, L, C) by itself, as it is without a codec."""
    codec = codec or ExactTaps()
    shape, dtype = total.shape, total.dtype

    def restore(kept: Sequence[Tensor]) -> Tensor:
        return codec.decode(kept, dtype).view(shape)

    return KeptSum(codec.encode(total.detach().flatten(0, -2)), restore)


class TokenNorm(NamedTuple):
    """A layer norm over the channels of each token."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> 'TokenNorm | nn.Module':
        """That of a stock module; one of another kind as it is."""
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            return cls(norm.weight, norm.bias, norm.eps)
        return norm

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return F.layer_norm(tokens, self.weight.shape, *self)


class Invertible:
    """Whether the input of a norm comes back from its output.

    Weights change slowly, and the answer makes the host wait for the device.
    So another than a CPU is asked once in ``EVERY`` steps; before the inverse
    fails it is merely less precise.
    """

    EVERY = 64

    def __init__(self) -> None:
        self._asked = 0
        self._answer = False

    def __call__(self, norm: TokenNorm, dtype: torch.dtype) -> bool:
        """For an output in ``dtype``."""
        if dtype not in INVERTIBLE:
            return False
        if norm.weight.is_meta:
            return True
        if norm.weight.device.type == 'cpu' or self._asked % self.EVERY == 0:
            ratio, least = INVERTIBLE[dtype]
            weight, bias = norm.weight.detach().abs(), norm.bias.detach().abs()
            self._answer = bool(
                ((weight > least) & (bias <= ratio * weight)).all()
            )
        self._asked += 1
        return self._answer


def normalise(
    norm: TokenNorm | Callable[[Tensor], Tensor] | None,
    total: Tensor,
    size: tuple[int, int],
    invertible: 'Invertible | None' = None,
) -> tuple[Tensor, KeptSum]:
    """The output of a stage.

    Args:
        norm (TokenNorm | Callable, optional): The output norm.
        total (Tensor): (B, extra + L, C), trunk and highway.
        size (tuple[int, int]): (H, W), H * W = L. Tokens before the last L
            are no part of the map.
        invertible (Invertible, optional): Whose question about this norm was
            answered before. Defaults to a new one.

    Returns:
        tuple[Tensor, KeptSum]: The map (B, C, H, W), in autocast's type where
        that is on, and what is kept of ``total``.
    """
    dtype = autocast_dtype(total) or total.dtype
    length = size[0] * size[1]
    if total.shape[1] > length:
        output, _ = normalise(norm, total[:, -length:], size, invertible)
        return output, keep(total)
    if norm is None:
        return _to_map(total, size, dtype), keep(total)
    # Traces, as of tools that count operations, know no function of ours.
    plainly = not torch.is_grad_enabled() or torch.jit.is_tracing()
    known = isinstance(norm, TokenNorm)
    invertible = invertible or Invertible()
    if plainly or not (known and invertible(norm, dtype)):
        with autocast_off(total):
            return _to_map(norm(total), size, dtype), keep(total)
    with autocast_off(total):
        output, mean, rstd = _Norm.apply(total, *norm, size, dtype)

    def restore(kept: Sequence[Tensor]) -> Tensor:
        output, mean, rstd, weight, bias = kept
        normed = _normed(output, weight, bias, rstd.dtype)
        return normed.div_(rstd).add_(mean)

    kept = (output, mean, rstd, norm.weight, norm.bias)
    return output, KeptSum(tuple(t.detach() for t in kept), restore)


def downsample_difference(
    total: Tensor, trunk: Tensor, kept: KeptSum, downsampling: Downsampling
) -> Tensor:
    """``PM(total) - PM(trunk)``: (B, L, C) twice -> (B, L', C')."""
    if torch.jit.is_tracing():
        return _difference(total, trunk, downsampling)
    return _Difference.apply(
        total, trunk, downsampling, kept.restore, *kept.tensors
    )


def downsample_linear(highway: Tensor, downsampling: Downsampling) -> Tensor:
    """``PM`` of the highway without its norm: (B, L, C) -> (B, L', C')."""
    gathered = downsampling.gather(highway, norm=False)
    if downsampling.weight is None:
        return gathered
    if torch.jit.is_tracing():
        return _product(gathered, downsampling)
    return _Product.apply(gathered, downsampling)


def _product(gathered: Tensor, downsampling: Downsampling) -> Tensor:
    weight = downsampling.weight()
    with autocast_off(gathered):
        return linear(gathered.to(weight.dtype), weight)


class _Norm(torch.autograd.Function):
    """Layer norm to a map, backward from the map."""

    @staticmethod
    def forward(ctx, total, weight, bias, eps, size, dtype):
        tokens, mean, rstd = torch.native_layer_norm(
            total, total.shape[-1:], weight, bias, eps
        )
        output = _to_map(tokens, size, dtype)
        ctx.save_for_backward(output, rstd, weight, bias)
        ctx.mark_non_differentiable(mean, rstd)
        return output, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        output, rstd, weight, bias = ctx.saved_tensors
        normed = _normed(output, weight, bias, rstd.dtype)
        # With mean zero and deviation one, this is the backward of a norm
        # whose input is `normed`; the true deviation is left.
        grad_total, grad_weight, grad_bias = (
            torch.ops.aten.native_layer_norm_backward(
                _to_tokens(grad, normed.dtype),
                normed,
                normed.shape[-1:],
                torch.zeros_like(rstd),
                torch.ones_like(rstd),
                weight,
                bias,
                ctx.needs_input_grad[:3],
            )
        )
        if grad_total is not None:
            grad_total.mul_(rstd)
        return grad_total, grad_weight, grad_bias, None, None, None


class _Difference(torch.autograd.Function):
    """The inherited downsampling; it keeps nothing but ``kept``."""

    @staticmethod
    def forward(ctx, total, trunk, downsampling, restore, *kept):
        ctx.downsampling, ctx.restore = downsampling, restore
        ctx.save_for_backward(*kept)
        return _difference(total, trunk, downsampling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept = ctx.saved_tensors  # once: a checkpoint gives them once
        total = ctx.restore(kept)
        weight = _weight(ctx.downsampling)
        grad_total = torch.empty_like(total)
        with autocast_off(grad):
            for band in _bands(ctx.downsampling, total):
                part = total[:, band.tokens].requires_grad_()
                with torch.enable_grad():
                    gathered = band.gather(part)
                (grad_total[:, band.tokens],) = torch.autograd.grad(
                    gathered,
                    part,
                    _before_product(grad[:, band.patches], weight),
                )
        return grad_total, None, None, None, *[None] * len(kept)


def _difference(
    total: Tensor, trunk: Tensor, downsampling: Downsampling
) -> Tensor:
    weight = _weight(downsampling)
    # In single precision at least: a highway that is small beside the trunk
    # would be lost in the rounding of the difference.
    wide = wide_dtype(total.dtype)
    done = []
    with autocast_off(total):
        for band in _bands(downsampling, total):
            gathered = band.gather(total[:, band.tokens].to(wide))
            gathered = gathered - band.gather(trunk[:, band.tokens].to(wide))
            if weight is not None:
                gathered = linear(gathered.to(weight.dtype), weight)
            done.append(gathered.to(wide))
    return torch.cat(done, 1)


def _bands(downsampling: Downsampling, tokens: Tensor) -> Iterable[Band]:
    """What is worked on at a time: temporaries are wide."""
    if downsampling.bands is None:
        return [Band(slice(None), slice(None), downsampling.gather)]
    return downsampling.bands(len(tokens))


class _Product(torch.autograd.Function):
    """The product of the downsampling; it keeps nothing."""

    @staticmethod
    def forward(ctx, gathered, downsampling):
        ctx.downsampling, ctx.dtype = downsampling, gathered.dtype
        return _product(gathered, downsampling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with autocast_off(grad):
            # Made again: a weight in another order is a copy, not to be kept.
            grad = _before_product(grad, ctx.downsampling.weight())
        return grad.to(ctx.dtype), None


def _weight(downsampling: Downsampling) -> Tensor | None:
    return None if downsampling.weight is None else downsampling.weight()


def _before_product(grad: Tensor, weight: Tensor | None) -> Tensor:
    """Gradients after the product (..., C') -> before it (..., G)."""
    if weight is None:
        return grad
    return linear(grad.to(weight.dtype), weight.t()).to(grad.dtype)


def _normed(
    output: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """(B, C, H, W) -> (B, L, C) before weight and bias, in ``dtype``."""
    return _to_tokens(output, dtype).sub_(bias).div_(weight)


def _to_map(
    tokens: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(B, L, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size).contiguous().to(dtype)


def _to_tokens(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> (B, L, C), a copy."""
    tokens = maps.flatten(2).transpose(1, 2)
    return tokens.to(dtype, memory_format=torch.contiguous_format, copy=True)
