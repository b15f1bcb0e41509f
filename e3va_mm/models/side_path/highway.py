"""The highway of one stage: all its adapters in one autograd function.

The adapters of a stage are parallel, so its highway is one product of their
inner vectors with their stacked last factors,

    h = h_0 + [u_1 ... u_K] [Q2_1; ...; Q2_K] + sum_k b2_k,
    u_k = GELU(x_k P1_k Q1_k + b1_k) P2_k,

and all of them share the one gradient that reaches ``h``. Kept for backward
are the taps ``x_k`` alone; bottlenecks are computed again, one at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .adapter import LowRankAdapter
from .kept_taps import TapCodec

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
        codec (TapCodec): How taps are kept for backward.
    """

    def __init__(self, base: Tensor | None, codec: TapCodec) -> None:
        self.base = base
        self.codec = codec
        self._adapters: list[LowRankAdapter] = []
        self._inner: list[Tensor] = []  # u_k, (N, r)
        self._kept: list[Tensor] = []
        self._shape: torch.Size | None = None
        self._sum: Tensor | None = None

    def add(self, adapter: LowRankAdapter, tap: Tensor) -> None:
        """Take in a tap (B, L, C); it is kept only if gradients are on."""
        dtype = _compute_dtype(tap, adapter)
        parameters = adapter_parameters(adapter)
        flat = tap.detach().flatten(0, -2)
        with torch.no_grad(), _autocast_off(tap):
            p1, q1, b1, p2, *_ = (p.to(dtype) for p in parameters)
            projected = flat.to(dtype) @ p1
            bottleneck = F.gelu(torch.addmm(b1, projected, q1))
            self._inner.append(bottleneck @ p2)
        if torch.is_grad_enabled():
            self._kept.extend(self.codec.encode(flat))
            if self.codec.lossy:
                self._kept.append(projected)
        self._adapters.append(adapter)
        self._shape = tap.shape

    def sum(self) -> Tensor | None:
        """(B, L, C), or None if there is neither a base nor a tap."""
        if self._sum is None and self._adapters:
            inner = torch.cat(self._inner, -1)
            dtype = inner.dtype
            base = self.base
            if base is not None:
                base = base.flatten(0, -2).to(dtype)
            parameters = [
                p.to(dtype)
                for adapter in self._adapters
                for p in adapter_parameters(adapter)
            ]
            with _autocast_off(inner):
                flat = _StageHighway.apply(
                    self.codec,
                    len(self._adapters),
                    base,
                    inner,
                    *self._kept,
                    *parameters,
                )
            self._sum = flat.view(self._shape)
            # What backward needs is kept by its node now.
            self._inner, self._kept = [], []
        return self.base if self._sum is None else self._sum


class _StageHighway(torch.autograd.Function):
    """See the module. Taps and ``inner`` are constants of the trunk."""

    @staticmethod
    def forward(
        ctx,
        codec: TapCodec,
        adapters: int,
        base: Tensor | None,
        inner: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        kept = len(tensors) - PARAMETERS * adapters
        ctx.codec, ctx.adapters, ctx.kept = codec, adapters, kept
        ctx.save_for_backward(*tensors)
        parameters = _grouped(tensors[kept:], PARAMETERS)
        bias = torch.stack([p[5] for p in parameters]).sum(0)
        last = torch.cat([p[4] for p in parameters])
        if base is not None:
            return torch.addmm(base, inner, last).add_(bias)
        return torch.addmm(bias, inner, last)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        taps = _grouped(tensors[: ctx.kept], ctx.kept // ctx.adapters)
        parameters = _grouped(tensors[ctx.kept :], PARAMETERS)
        rank = parameters[0][4].shape[0]
        grad = grad.contiguous()
        # One product for the gradients of all u_k, one for those of all Q2_k.
        grad_inner = grad @ torch.cat([p[4] for p in parameters]).t()
        grad_bias = grad.sum(0)
        inner = torch.empty_like(grad_inner)
        grads = []
        for k, (kept, (p1, q1, b1, p2, _, _)) in enumerate(
            zip(taps, parameters, strict=True)
        ):
            part = slice(k * rank, (k + 1) * rank)
            grad_u = grad_inner[:, part]
            if ctx.codec.lossy:
                *kept, projected = kept
                tap = ctx.codec.decode(tuple(kept), grad.dtype)
            else:
                tap = ctx.codec.decode(kept, grad.dtype)
                projected = tap @ p1
            before = torch.addmm(b1, projected, q1)
            bottleneck = F.gelu(before)
            torch.mm(bottleneck, p2, out=inner[:, part])
            grad_p2 = bottleneck.t() @ grad_u
            grad_before = torch.ops.aten.gelu_backward(grad_u @ p2.t(), before)
            del bottleneck, before
            grad_q1 = projected.t() @ grad_before
            grad_b1 = grad_before.sum(0)
            grad_p1 = tap.t() @ (grad_before @ q1.t())
            grads.append([grad_p1, grad_q1, grad_b1, grad_p2, None, grad_bias])
        grad_last = inner.t() @ grad
        for k, group in enumerate(grads):
            group[4] = grad_last[k * rank : (k + 1) * rank]
        grad_base = grad if ctx.needs_input_grad[2] else None
        return (
            None,
            None,
            grad_base,
            None,
            *[None] * ctx.kept,
            *(g for group in grads for g in group),
        )


def _grouped(items: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _compute_dtype(tap: Tensor, adapter: LowRankAdapter) -> torch.dtype:
    """Autocast's type where it is on, else that of the parameters."""
    device = tap.device.type
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    elif device == 'cpu':
        if torch.is_autocast_cpu_enabled():
            return torch.get_autocast_cpu_dtype()
    elif torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    return adapter.down.p.dtype


def _autocast_off(tensor: Tensor) -> torch.autocast:
    # Inside, every tensor has one type already, in backward too.
    return torch.autocast(tensor.device.type, enabled=False)
