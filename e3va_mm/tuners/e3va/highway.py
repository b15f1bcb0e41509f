"""The highway of one stage: all its adapters in one autograd function.

The adapters of a stage are parallel, so its highway is one product of their
inner vectors with their stacked last factors,

    h = h_0 + [u_1 ... u_K] [Q2_1; ...; Q2_K] + sum_k b2_k,
    u_k = GELU(x_k P1_k Q1_k + b1_k) P2_k,

and all of them share the one gradient that reaches ``h``. Kept for backward
are the taps ``x_k`` alone, or not even they; bottlenecks are computed again,
some tokens at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from e3va_mm.numerics.autocast import autocast_dtype, autocast_off
from e3va_mm.numerics.products import (
    fast_dtype,
    linear,
    product,
    transposed_product,
    wide_dtype,
)
from e3va_mm.tuners.e3va.adapter import LowRankAdapter
from e3va_mm.tuners.e3va.kept_taps import CHUNK, ExactTaps, TapCodec
from e3va_mm.tuners.e3va.replay import Replay

PARAMETERS = 6  # of an adapter: P1, Q1, b1, P2, Q2, b2


def adapter_parameters(adapter: LowRankAdapter) -> tuple[Tensor, ...]:
    """P1 (C, r), Q1 (r, n), b1 (n,), P2 (n, r), Q2 (r, C), b2 (C,)."""
    down, up = adapter.down, adapter.up
    return down.p, down.q, down.bias, up.p, up.q, up.bias


class Highway:
    """Collects the taps of one stage, then gives their sum.

    Args:
        base (Tensor, optional): (B, L, C), the highway inherited from the
            stage before, or None for zero.
        codec (TapCodec, optional): How taps are kept for backward; None to
            have them from ``replay``.
        replay (Replay, optional): Brings the taps again.
        stage (int): Index of the stage, for ``replay``. Defaults to 0.
        compute (torch.dtype, optional): Type of the products. Defaults to
            that of autocast where it is on, else to that of the parameters.
    """

    def __init__(
        self,
        base: Tensor | None,
        codec: TapCodec | None,
        replay: Replay | None = None,
        stage: int = 0,
        compute: torch.dtype | None = None,
    ) -> None:
        self.base = base
        self.codec = codec
        self.replay = replay
        self.stage = stage
        self.compute = compute
        self._adapters: list[LowRankAdapter] = []
        self._inner: list[Tensor] = []  # u_k, (N, r)
        self._kept: list[Tensor] = []
        self._shape: torch.Size | None = None
        self._sum: Tensor | None = None

    def add(self, adapter: LowRankAdapter, tap: Tensor) -> None:
        """Take in a tap (B, L, C); it is kept only if gradients are on."""
        parameters = adapter_parameters(adapter)
        dtype = self.compute or autocast_dtype(tap) or parameters[0].dtype
        dtype = fast_dtype(dtype, tap.device)
        flat = tap.detach().flatten(0, -2)
        with torch.no_grad(), autocast_off(tap):
            p1, q1, b1, p2, *_ = (p.to(dtype) for p in parameters)
            projected, inner = (
                flat.new_empty(len(flat), p1.shape[1], dtype=dtype)
                for _ in range(2)
            )
            for rows in _chunks(len(flat)):
                projected[rows] = product(flat[rows].to(dtype), p1)
                bottleneck = F.gelu(linear(projected[rows], q1.t(), b1))
                inner[rows] = product(bottleneck, p2)
        self._inner.append(inner)
        if torch.is_grad_enabled() and self.codec is not None:
            self._kept.extend(self.codec.encode(flat))
            if self.codec.lossy:
                if projected.element_size() > 2:
                    projected = projected.to(torch.bfloat16)
                self._kept.append(projected)
        self._adapters.append(adapter)
        self._shape = tap.shape

    def sum(self) -> Tensor | None:
        """(B, L, C), or None if there is neither a base nor a tap."""
        if self._sum is None and self._adapters:
            inner = torch.cat(self._inner, -1)
            base = self.base
            if base is not None:
                base = base.flatten(0, -2)
            if torch.is_grad_enabled() and self.codec is None:
                self.replay.want(self.stage)
                self._kept = [self.replay.image]
            parameters = [
                p
                for adapter in self._adapters
                for p in adapter_parameters(adapter)
            ]
            with autocast_off(inner):
                flat = _StageHighway.apply(
                    self.codec,
                    self.replay,
                    self.stage,
                    len(self._adapters),
                    base,
                    inner,
                    *self._kept,
                    *parameters,
                )
            self._sum = flat.view(self._shape)
            # What backward needs is kept by its node now.
            self._inner, self._kept, self.replay = [], [], None
        return self.base if self._sum is None else self._sum

    def add_to_sum(self, more: Tensor) -> None:
        """Add what was made of the sum (B, L, C) itself."""
        total = self.sum()
        self._sum = more if total is None else total + more


class _StageHighway(torch.autograd.Function):
    """See the module. Taps and ``inner`` are constants of the trunk."""

    @staticmethod
    def forward(
        ctx,
        codec: TapCodec | None,
        replay: Replay | None,
        stage: int,
        adapters: int,
        base: Tensor | None,
        inner: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        kept = len(tensors) - PARAMETERS * adapters
        ctx.codec, ctx.adapters, ctx.kept = codec, adapters, kept
        ctx.replay, ctx.stage, ctx.dtype = replay, stage, inner.dtype
        ctx.save_for_backward(*tensors)
        parameters = _grouped(tensors[kept:], PARAMETERS)
        bias = torch.stack([p[5] for p in parameters]).sum(0)
        last = torch.cat([p[4] for p in parameters])
        last, bias = last.to(inner.dtype), bias.to(inner.dtype)
        added = linear(inner, last.t(), bias)
        # The base is as precise as it came.
        return added if base is None else base + added

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        kept, parameters = tensors[: ctx.kept], tensors[ctx.kept :]
        with autocast_off(grad):  # some call backward under it
            backward = _StageBackward(
                grad.contiguous(),
                _grouped(parameters, PARAMETERS),
                ctx.codec,
                ctx.dtype,
            )
            if ctx.codec:
                for group in _grouped(kept, ctx.kept // ctx.adapters):
                    backward.adapter(group)
            else:
                taps = ctx.replay.take(ctx.stage, kept[0])[::-1]
                while taps:  # each goes before the next is worked on
                    backward.adapter([taps.pop().flatten(0, -2)])
            gradients = list(backward.finish())
        grad_base = grad if ctx.needs_input_grad[4] else None
        return (
            *(None, None, None, None, grad_base, None),
            *[None] * ctx.kept,
            *gradients,
        )


class _StageBackward:
    """Gradients of the adapters of a stage, one tap after the other.

    Args:
        grad (Tensor): (N, C), the gradient that all of them share.
        parameters (Sequence): Those of each adapter.
        codec (TapCodec, optional): How taps were kept, None for as they came.
        dtype (torch.dtype): Type of the products.
    """

    def __init__(
        self,
        grad: Tensor,
        parameters: Sequence[Sequence[Tensor]],
        codec: TapCodec | None,
        dtype: torch.dtype,
    ) -> None:
        self.parameters = parameters
        self.codec = codec or ExactTaps()
        self.dtype = dtype
        self.grad_bias = grad.sum(0, dtype=wide_dtype(grad.dtype))
        self.grad = grad.to(dtype)
        # One product for the gradients of all u_k.
        last = torch.cat([p[4] for p in parameters]).to(dtype)
        self.grad_inner = linear(self.grad, last)
        self.inner = torch.empty_like(self.grad_inner)
        self.done: list[list[Tensor]] = []

    def adapter(self, kept: Sequence[Tensor]) -> None:
        """Take in what was kept of the next tap."""
        parameters = self.parameters[len(self.done)]
        p1, q1, b1, p2, *_ = (p.to(self.dtype) for p in parameters)
        part = slice(
            len(self.done) * p1.shape[1], (len(self.done) + 1) * p1.shape[1]
        )
        # Sums over tokens, in single precision at least.
        sums = [
            torch.zeros_like(p, dtype=wide_dtype(self.dtype))
            for p in (p1, q1, b1, p2)
        ]
        for rows in _chunks(len(self.grad)):
            grad_u = self.grad_inner[rows, part]
            tap, projected = self._part(kept, rows, p1)
            before = linear(projected, q1.t(), b1)
            bottleneck = F.gelu(before)
            self.inner[rows, part] = product(bottleneck, p2)
            grad_before = torch.ops.aten.gelu_backward(
                linear(grad_u, p2), before
            )
            for total, term in zip(
                sums,
                (
                    self.codec.transposed_product(
                        tap, linear(grad_before, q1)
                    ),
                    product(projected.t(), grad_before),
                    grad_before.sum(0, dtype=wide_dtype(self.dtype)),
                    transposed_product(bottleneck, grad_u),
                ),
                strict=True,
            ):
                total += term
        self.done.append(sums)

    def _part(
        self, kept: Sequence[Tensor], rows: slice, p1: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        """What is kept of some tokens, and their projection (n, r)."""
        if self.codec.lossy:
            *kept, projected = kept
            projected = projected[rows].to(p1.dtype)
            return self.codec.rows(kept, rows), projected
        tap = self.codec.decode(self.codec.rows(kept, rows), p1.dtype)
        return [tap], product(tap, p1)

    def finish(self) -> Iterator[Tensor]:
        """Gradients of all parameters, adapter by adapter."""
        # One product for those of all Q2_k.
        grad_last = product(self.inner.t(), self.grad)
        for sums, last, parameters in zip(
            self.done,
            grad_last.chunk(len(self.done)),
            self.parameters,
            strict=True,
        ):
            for total, parameter in zip(
                (*sums, last, self.grad_bias), parameters, strict=True
            ):
                yield total.to(parameter.dtype)


def _chunks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, CHUNK):
        yield slice(first, min(first + CHUNK, tokens))


def _grouped(items: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
