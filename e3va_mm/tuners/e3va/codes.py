"""Low-rank codes of a stage's taps, and what their gradient needs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.tuners.e3va.kept_taps import ExactTaps, TapCodec
from e3va_mm.tuners.e3va.projected_taps import ProjectedTaps, taken_again
from e3va_mm.tuners.e3va.replay import Replay


class Codes(ProjectedTaps):
    """Collects the taps of one stage, then gives their codes."""

    def codes(self) -> Tensor:
        """(B, L, K * r), ``x_k P_k`` beside each other."""
        kept = self._kept_tensors()
        with autocast_off(kept[0] if kept else self._projected):
            if self._projected is None:  # kept are the taps
                taps = torch.stack(kept).to(self.factors.dtype)
                flat = torch.bmm(taps, self.factors).transpose(0, 1)
            else:
                flat = _Codes.apply(
                    self.codec,
                    self.replay,
                    self.stage,
                    self._projected,
                    self.factors,
                    *kept,
                )
        found = flat.reshape(*self._shape[:-1], -1)
        self._release()
        return found


class _Codes(torch.autograd.Function):
    """Products that are done; taps are constants of the trunk."""

    @staticmethod
    def forward(
        ctx,
        codec: TapCodec | None,
        replay: Replay | None,
        stage: int,
        projected: Tensor,
        factors: Tensor,
        *kept: Tensor,
    ) -> Tensor:
        ctx.codec, ctx.replay, ctx.stage = codec, replay, stage
        ctx.dtype, ctx.count = factors.dtype, len(factors)
        ctx.save_for_backward(*kept)
        return projected.view_as(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        kept = ctx.saved_tensors
        codec = ctx.codec or ExactTaps()
        with autocast_off(grad):  # some call backward under it
            taps = taken_again(
                ctx.codec, ctx.replay, ctx.stage, ctx.count, kept
            )
            found = codec.transposed_products(taps, grad).to(ctx.dtype)
        return None, None, None, None, found, *[None] * len(kept)
