"""The highway of one stage: its bank of adapters in one autograd function.

The adapters of a stage are parallel, so its highway is one product of their
inner vectors with their last factors below each other,

    h = h_0 + [u_1 ... u_K] [Q2_1; ...; Q2_K] + sum_k b2_k,
    u_k = GELU(z_k Q1_k + b1_k) P2_k,  z_k = x_k P1_k,

and all of them share the one gradient that reaches ``h``. Kept for backward
are the taps ``x_k`` alone, or not even they; bottlenecks are computed again,
as many at a time as the device has room for.

``z`` and ``u`` are (N, K * r) in memory, so that the last product is one, and
are worked on as (K, N, r).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.products import (
    grouped_product,
    grouped_transposed_product,
    linear,
    transposed_product,
    wide_dtype,
)
from e3va_mm.numerics.temporaries import temporary_bytes
from e3va_mm.tuners.e3va.adapter import AdapterBank
from e3va_mm.tuners.e3va.kept_taps import ExactTaps, TapCodec
from e3va_mm.tuners.e3va.projected_taps import ProjectedTaps, taken_again
from e3va_mm.tuners.e3va.replay import Replay

PARAMETERS = 6  # of a bank, see `bank_parameters`


def bank_parameters(bank: AdapterBank) -> tuple[Tensor, ...]:
    """P1 (K, C, r), Q1 (K, r, n), b1 (K, n), P2 (K, n, r), Q2, b2 (K, C)."""
    down, up = bank.down, bank.up
    return down.p, down.q, down.bias, up.p, up.q, up.bias


class Highway(ProjectedTaps):
    """Collects the taps of one stage, then gives their sum.

    Args:
        bank (AdapterBank, optional): The adapters of the stage; None if it
            reads no tap.
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
        bank: AdapterBank | None,
        base: Tensor | None,
        codec: TapCodec | None,
        replay: Replay | None = None,
        stage: int = 0,
        compute: torch.dtype | None = None,
    ) -> None:
        factors = None if bank is None else bank.down.p
        super().__init__(factors, codec, replay, stage, compute)
        self.bank = bank
        self.base = base
        self._sum: Tensor | None = None

    def sum(self) -> Tensor | None:
        """(B, L, C), or None if there is neither a base nor a tap."""
        if self._sum is None and self._kept:
            base = self.base
            if base is not None:
                base = base.flatten(0, -2)
            kept = self._kept_tensors()
            with autocast_off(kept[0] if kept else self._projected):
                if self._projected is None:  # kept are the taps
                    taps = torch.stack(kept).to(self.bank.down.p.dtype)
                    flat = self.bank(taps).sum(0)
                    flat = flat if base is None else base + flat
                else:
                    flat = _StageHighway.apply(
                        self.codec,
                        self.replay,
                        self.stage,
                        base,
                        self._projected,
                        *kept,
                        *bank_parameters(self.bank),
                    )
            self._sum = flat.view(self._shape)
            self._release()
        return self.base if self._sum is None else self._sum

    def add_to_sum(self, more: Tensor) -> None:
        """Add what was made of the sum (B, L, C) itself."""
        total = self.sum()
        self._sum = more if total is None else total + more


class _StageHighway(torch.autograd.Function):
    """See the module. Taps and projections are constants of the trunk."""

    @staticmethod
    def forward(
        ctx,
        codec: TapCodec | None,
        replay: Replay | None,
        stage: int,
        base: Tensor | None,
        projected: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        *kept, p1, q1, b1, p2, q2, b2 = tensors
        ctx.codec, ctx.replay, ctx.stage = codec, replay, stage
        ctx.dtype, ctx.kept = projected.dtype, len(kept)
        inner = projected
        if kept and codec is not None and codec.lossy:
            # So that little more than the gradient of P1 is approximate.
            if projected.element_size() > 2:
                tensors = (projected.to(torch.bfloat16), *tensors)
            else:
                tensors = (projected, *tensors)
                inner = torch.empty_like(projected)
        ctx.save_for_backward(*tensors)
        q1, b1, p2, q2 = (p.to(projected.dtype) for p in (q1, b1, p2, q2))
        x, u = projected.transpose(0, 1), inner.transpose(0, 1)
        for taps, rows in _portions(x, q1):
            bottleneck = F.gelu(
                grouped_product(x[taps, rows], q1[taps], b1[taps])
            )
            # In the place of the projections, where these are not kept.
            grouped_product(bottleneck, p2[taps], out=u[taps, rows])
        bias = b2.sum(0).to(projected.dtype)
        added = linear(inner.flatten(1), q2.flatten(0, 1).t(), bias)
        # The base is as precise as it came.
        return added if base is None else base + added

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        tensors, parameters = tensors[:-PARAMETERS], tensors[-PARAMETERS:]
        codec, projected = ctx.codec or ExactTaps(), None
        if codec.lossy:
            projected, *tensors = tensors
            projected = projected.to(ctx.dtype)
        with autocast_off(grad):  # some call backward under it
            taps = taken_again(
                ctx.codec, ctx.replay, ctx.stage, len(parameters[0]), tensors
            )
            gradients = _gradients(
                grad.contiguous(),
                parameters,
                codec,
                taps,
                projected,
                ctx.dtype,
            )
        return (
            None,
            None,
            None,
            grad if ctx.needs_input_grad[3] else None,
            None,
            *[None] * ctx.kept,
            *gradients,
        )


def _gradients(
    grad: Tensor,
    parameters: Sequence[Tensor],
    codec: TapCodec,
    kept: list[Sequence[Tensor]],
    projected: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of the parameters of a bank.

    Args:
        grad (Tensor): (N, C), the gradient that all adapters share.
        parameters (Sequence[Tensor]): See :func:`bank_parameters`.
        codec (TapCodec): How taps were kept.
        kept (list[Sequence[Tensor]]): What was kept of each tap; emptied.
        projected (Tensor, optional): (N, K, r), where that was kept too.
        dtype (torch.dtype): Type of the products.
    """
    wide = wide_dtype(dtype)
    p1, q1, b1, p2, q2, _ = (p.to(dtype) for p in parameters)
    count, _, rank = p1.shape
    grad_b2 = grad.sum(0, dtype=wide_dtype(grad.dtype)).expand(count, -1)
    grad = grad.to(dtype)
    own = projected is None
    if own:
        projected = grad.new_empty(len(grad), count, rank)
        for index, tap in enumerate(kept):
            codec.product(tap, p1[index], out=projected[:, index])
    # Sums over tokens, in single precision at least.
    grad_q1, grad_b1, grad_p2 = (
        torch.empty_like(p, dtype=wide) for p in (q1, b1, p2)
    )
    grad_inner = linear(grad, q2.flatten(0, 1)).unflatten(1, (count, rank))
    inner = projected if own else torch.empty_like(projected)
    x, u, grad_u = (t.transpose(0, 1) for t in (projected, inner, grad_inner))
    for taps, rows in _portions(x, q1):
        part, grad_part = x[taps, rows], grad_u[taps, rows]
        before = grouped_product(part, q1[taps], b1[taps])
        bottleneck = F.gelu(before)
        grad_before = torch.ops.aten.gelu_backward(
            grouped_product(grad_part, p2[taps].mT), before
        )
        del before
        for total, term in (
            (grad_q1, grouped_transposed_product(part, grad_before)),
            (grad_b1, grad_before.sum(1, dtype=wide)),
            (grad_p2, grouped_transposed_product(bottleneck, grad_part)),
        ):
            if rows.start:
                total[taps] += term
            else:
                total[taps] = term
        # Both in the place of what has been used up.
        grouped_product(bottleneck, p2[taps], out=u[taps, rows])
        grouped_product(grad_before, q1[taps].mT, out=grad_part)
        del bottleneck, grad_before
    grad_q2 = transposed_product(inner.flatten(1), grad)
    del inner, projected, x, u
    grad_p1 = codec.transposed_products(kept, grad_inner)
    found = (grad_p1, grad_q1, grad_b1, grad_p2, grad_q2.view_as(q2), grad_b2)
    return [
        gradient.to(parameter.dtype)
        for gradient, parameter in zip(found, parameters, strict=True)
    ]


def _portions(x: Tensor, q1: Tensor) -> Iterator[tuple[slice, slice]]:
    """Taps and tokens of (K, N, r) whose bottlenecks are there at a time."""
    count, tokens, _ = x.shape
    room = temporary_bytes(x.device) // (q1.shape[-1] * q1.element_size())
    rows = max(1, min(tokens, room))
    group = max(1, room // tokens) if tokens else count
    for tap in range(0, count, group):
        for row in range(0, tokens, rows):
            yield slice(tap, tap + group), slice(row, row + rows)
