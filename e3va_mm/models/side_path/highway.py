"""The highway of one stage: all its adapters in one autograd function.

The adapters of a stage are parallel, so its highway is one product of their
inner vectors with their stacked last factors,

    h = h_0 + [u_1 ... u_K] [Q2_1; ...; Q2_K] + sum_k b2_k,
    u_k = GELU(x_k P1_k Q1_k + b1_k) P2_k,

and all of them share the one gradient that reaches ``h``. Kept for backward
are the taps ``x_k`` alone, or not even they; bottlenecks are computed again,
some tokens at a time. A convolution of the projections ``x_k P1_k`` needs
those of all tokens at once, which are few numbers each.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..trunks.options import autocast_dtype, autocast_off
from ..trunks.products import (
    fast_dtype,
    linear,
    product,
    transposed_product,
    wide_dtype,
)
from .adapter import Grid, LowRankAdapter
from .kept_taps import CHUNK, ExactTaps, TapCodec
from .replay import Replay

EPS = 1e-5  # of standardised tokens, as `F.layer_norm` has it


class Parameters(NamedTuple):
    """Those of an adapter; None for what it does not have."""

    p1: Tensor  # (C, r)
    q1: Tensor  # (r, n)
    b1: Tensor  # (n,)
    p2: Tensor  # (n, r)
    q2: Tensor  # (r, C)
    b2: Tensor  # (C,)
    kernel: Tensor | None  # (r, 1, k, k)
    scale: Tensor | None  # (1,)

    def to(self, dtype: torch.dtype) -> 'Parameters':
        """The same in another type."""
        return Parameters(*(p if p is None else p.to(dtype) for p in self))


PARAMETERS = len(Parameters._fields)


def adapter_parameters(adapter: LowRankAdapter) -> Parameters:
    """The parameters of an adapter, in the order that the highway has."""
    down, up = adapter.down, adapter.up
    return Parameters(
        *(down.p, down.q, down.bias, up.p, up.q, up.bias),
        *(adapter.kernel, adapter.scale),
    )


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

    Attributes:
        size (tuple[int, int], optional): (H, W) of the last H * W tokens, to
            be set before the sum where adapters convolve.
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
        self.size: tuple[int, int] | None = None
        self._adapters: list[LowRankAdapter] = []
        # Of each adapter u_k, or what it is made of once the size is known:
        # x_k P1_k, both (N, r).
        self._inner: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._shape: torch.Size | None = None
        self._sum: Tensor | None = None

    def add(self, adapter: LowRankAdapter, tap: Tensor) -> None:
        """Take in a tap (B, L, C); it is kept only if gradients are on."""
        parameters = adapter_parameters(adapter)
        dtype = self.compute or autocast_dtype(tap) or parameters.p1.dtype
        dtype = fast_dtype(dtype, tap.device)
        flat = tap.detach().flatten(0, -2)
        with torch.no_grad(), autocast_off(tap):
            p1 = parameters.p1.to(dtype)
            projected = flat.new_empty(len(flat), p1.shape[1], dtype=dtype)
            moments = []
            for rows in _chunks(len(flat)):
                part = flat[rows]
                if adapter.norm:
                    part, found = _standardised(part)
                    moments.append(found)
                projected[rows] = product(part.to(dtype), p1)
            if parameters.kernel is None:
                self._inner.append(_inner(projected, parameters))
            else:
                self._inner.append(projected)
        if torch.is_grad_enabled() and self.codec is not None:
            self._kept.extend(self.codec.encode(flat))
            if self.codec.lossy:
                if adapter.norm:
                    self._kept.append(torch.cat(moments))
                if projected.element_size() > 2:
                    projected = projected.to(torch.bfloat16)
                self._kept.append(projected)
        self._adapters.append(adapter)
        self._shape = tap.shape

    def sum(self) -> Tensor | None:
        """(B, L, C), or None if there is neither a base nor a tap."""
        if self._sum is None and self._adapters:
            every = [adapter_parameters(each) for each in self._adapters]
            grid = self.size and Grid(self._shape[0], self.size)
            inner = torch.cat(list(self._inner_vectors(every, grid)), -1)
            base = self.base
            if base is not None:
                base = base.flatten(0, -2)
            if torch.is_grad_enabled() and self.codec is None:
                self.replay.want(self.stage)
                self._kept = [self.replay.image]
            with autocast_off(inner):
                flat = _StageHighway.apply(
                    base,
                    inner,
                    self.codec,
                    self.replay,
                    self.stage,
                    len(self._adapters),
                    grid,
                    self._adapters[0].norm,
                    *self._kept,
                    *(p for parameters in every for p in parameters),
                )
            self._sum = flat.view(self._shape)
            # What backward needs is kept by its node now.
            self._inner, self._kept, self.replay = [], [], None
        return self.base if self._sum is None else self._sum

    @torch.no_grad()
    def _inner_vectors(
        self, every: Sequence[Parameters], grid: Grid | None
    ) -> Iterator[Tensor]:
        for held, parameters in zip(self._inner, every, strict=True):
            if parameters.kernel is None:
                yield held
                continue
            with autocast_off(held):
                mixed = _mixed(held, parameters.kernel, grid)
                yield _inner(mixed, parameters)

    def add_to_sum(self, more: Tensor) -> None:
        """Add what was made of the sum (B, L, C) itself."""
        total = self.sum()
        self._sum = more if total is None else total + more


class _StageHighway(torch.autograd.Function):
    """See the module. Taps and ``inner`` are constants of the trunk."""

    @staticmethod
    def forward(
        ctx,
        base: Tensor | None,
        inner: Tensor,
        codec: TapCodec | None,
        replay: Replay | None,
        stage: int,
        adapters: int,
        grid: Grid | None,
        norm: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        kept = len(tensors) - PARAMETERS * adapters
        ctx.codec, ctx.adapters, ctx.kept = codec, adapters, kept
        ctx.replay, ctx.stage, ctx.dtype = replay, stage, inner.dtype
        ctx.grid, ctx.norm = grid, norm
        ctx.save_for_backward(*tensors)
        parameters = _parameters(tensors[kept:])
        bias = torch.stack([p.b2 for p in parameters]).sum(0)
        last = torch.cat([p.q2 for p in parameters])
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
                _parameters(parameters),
                ctx.codec,
                ctx.dtype,
                ctx.grid,
                ctx.norm,
            )
            if ctx.codec:
                for group in _grouped(kept, ctx.kept // ctx.adapters):
                    backward.adapter(group)
            else:
                taps = ctx.replay.take(ctx.stage, kept[0])[::-1]
                while taps:  # each goes before the next is worked on
                    backward.adapter([taps.pop().flatten(0, -2)])
            gradients = list(backward.finish())
        grad_base = grad if ctx.needs_input_grad[0] else None
        return (
            *(grad_base, None, None, None, None, None, None, None),
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
        grid (Grid, optional): Where the tokens lie, for convolutions.
        norm (bool): Whether tokens were standardised.
    """

    def __init__(
        self,
        grad: Tensor,
        parameters: Sequence[Parameters],
        codec: TapCodec | None,
        dtype: torch.dtype,
        grid: Grid | None,
        norm: bool,
    ) -> None:
        self.parameters = parameters
        self.codec = codec or ExactTaps()
        self.dtype = dtype
        self.grid, self.norm = grid, norm
        self.grad_bias = grad.sum(0, dtype=wide_dtype(grad.dtype))
        self.grad = grad.to(dtype)
        # One product for the gradients of all u_k.
        last = torch.cat([p.q2 for p in parameters]).to(dtype)
        self.grad_inner = linear(self.grad, last)
        self.inner = torch.empty_like(self.grad_inner)
        self.done: list[dict[str, Tensor]] = []

    def adapter(self, kept: Sequence[Tensor]) -> None:
        """Take in what was kept of the next tap."""
        own = self.parameters[len(self.done)]
        p1, q1, b1, p2, _, _, kernel, scale = own.to(self.dtype)
        part = slice(
            len(self.done) * p1.shape[1], (len(self.done) + 1) * p1.shape[1]
        )
        # Sums over tokens, in single precision at least.
        wide = wide_dtype(self.dtype)
        sums = {
            name: torch.zeros_like(p, dtype=wide)
            for name, p in own._asdict().items()
            if p is not None and name not in ('q2', 'b2')
        }
        mixed = None
        if kernel is not None:
            projected = torch.cat(
                [
                    self._part(kept, rows, p1)[1]
                    for rows in _chunks(len(self.grad))
                ]
            )
            mixed = _mixed(projected, own.kernel, self.grid)
            grad_mixed = torch.empty_like(mixed)
        for rows in _chunks(len(self.grad)):
            grad_u = self.grad_inner[rows, part]
            if mixed is None:
                tap, z, moments = self._part(kept, rows, p1)
            else:
                z = mixed[rows]
            before = linear(z, q1.t(), b1)
            bottleneck = F.gelu(before)
            inner = product(bottleneck, p2)
            if scale is not None:
                sums['scale'] += (grad_u.to(wide) * inner).sum()
                inner, grad_u = inner * scale, grad_u * scale
            self.inner[rows, part] = inner
            grad_before = torch.ops.aten.gelu_backward(
                linear(grad_u, p2), before
            )
            grad_z = linear(grad_before, q1)
            if mixed is None:
                sums['p1'] += self._grad_first(tap, grad_z, moments)
            else:
                grad_mixed[rows] = grad_z
            sums['q1'] += product(z.t(), grad_before)
            sums['b1'] += grad_before.sum(0, dtype=wide)
            sums['p2'] += transposed_product(bottleneck, grad_u)
        if mixed is not None:
            grad_projected, sums['kernel'] = _mixed_backward(
                grad_mixed, projected, own.kernel, self.grid
            )
            for rows in _chunks(len(self.grad)):
                tap, moments = self._tap(kept, rows)
                sums['p1'] += self._grad_first(
                    tap, grad_projected[rows], moments
                )
        self.done.append(sums)

    def _tap(
        self, kept: Sequence[Tensor], rows: slice
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """What is kept of some tokens, and moments yet to be applied."""
        if self.codec.lossy:
            kept, moments = kept[:-1], None
            if self.norm:
                *kept, moments = kept
                moments = moments[rows]
            return self.codec.rows(kept, rows), moments
        tap = kept[0][rows]
        if self.norm:
            tap, _ = _standardised(tap)
        return [self.codec.decode([tap], self.dtype)], None

    def _part(
        self, kept: Sequence[Tensor], rows: slice, p1: Tensor
    ) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
        """What :meth:`_tap` gives, with the projection (n, r) between."""
        tap, moments = self._tap(kept, rows)
        if self.codec.lossy:
            return tap, kept[-1][rows].to(p1.dtype), moments
        return tap, product(tap[0], p1), moments

    def _grad_first(
        self,
        tap: Sequence[Tensor],
        grad: Tensor,
        moments: Tensor | None,
    ) -> Tensor:
        """Gradient of P1 from that of the projection (n, r)."""
        if moments is None:
            return self.codec.transposed_product(tap, grad)
        # The transpose of (x - mean) / deviation, without making it.
        mean, inverse = (
            moments.to(wide_dtype(grad.dtype)).unsqueeze(-1).unbind(1)
        )
        scaled = grad * inverse
        found = self.codec.transposed_product(tap, scaled.to(grad.dtype))
        return found - (scaled * mean).sum(0)

    def finish(self) -> Iterator[Tensor | None]:
        """Gradients of all parameters, adapter by adapter."""
        # One product for those of all Q2_k.
        grad_last = product(self.inner.t(), self.grad)
        for sums, last, parameters in zip(
            self.done,
            grad_last.chunk(len(self.done)),
            self.parameters,
            strict=True,
        ):
            found = dict(sums, q2=last, b2=self.grad_bias)
            for name, parameter in parameters._asdict().items():
                if parameter is None:
                    yield None
                else:
                    yield found[name].to(parameter.dtype)


def _standardised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, C) -> with mean 0 and deviation 1, and the moments (n, 2).

    The moments are the mean and the reciprocal of the deviation.
    """
    wide = tokens.to(wide_dtype(tokens.dtype))
    normed, mean, inverse = torch.native_layer_norm(
        wide, wide.shape[-1:], None, None, EPS
    )
    return normed, torch.cat([mean, inverse], -1)


def _mixed(projected: Tensor, kernel: Tensor, grid: Grid) -> Tensor:
    """Projections (N, r) and their convolution, in single precision."""
    wide = wide_dtype(projected.dtype)
    return grid.mix(projected.to(wide), kernel.to(wide)).to(projected.dtype)


def _mixed_backward(
    grad: Tensor, projected: Tensor, kernel: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Gradients of both from that (N, r) of what they were mixed to."""
    wide = wide_dtype(projected.dtype)
    inputs = [
        t.detach().to(wide).requires_grad_() for t in (projected, kernel)
    ]
    with torch.enable_grad():
        mixed = grid.mix(*inputs)
    through, grad_kernel = torch.autograd.grad(mixed, inputs, grad.to(wide))
    return through.to(grad.dtype), grad_kernel


def _inner(projected: Tensor, parameters: Parameters) -> Tensor:
    """u_k of projections, both (N, r)."""
    _, q1, b1, p2, _, _, _, scale = parameters.to(projected.dtype)
    inner = torch.empty_like(projected)
    for rows in _chunks(len(projected)):
        bottleneck = F.gelu(linear(projected[rows], q1.t(), b1))
        inner[rows] = product(bottleneck, p2)
    return inner if scale is None else inner * scale


def _parameters(tensors: Sequence[Tensor | None]) -> list[Parameters]:
    return [Parameters(*group) for group in _grouped(tensors, PARAMETERS)]


def _chunks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, CHUNK):
        yield slice(first, min(first + CHUNK, tokens))


def _grouped(items: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
