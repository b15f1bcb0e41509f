"""The taps of one stage, multiplied by the first factors of what reads them.

A tap is multiplied as soon as it is there, so that no more of it stays than
backward needs: the tap in the form of ``save_taps``, or nothing.
"""

import torch
from torch import Tensor

from e3va_mm.numerics.autocast import autocast_dtype, autocast_off
from e3va_mm.numerics.products import fast_dtype, product
from e3va_mm.tuners.e3va.kept_taps import TapCodec
from e3va_mm.tuners.e3va.replay import Replay


class ProjectedTaps:
    """Collects the taps of one stage.

    Args:
        factors (Tensor): (K, C, r), one factor for each tap.
        codec (TapCodec, optional): How taps are kept for backward; None to
            have them from ``replay``.
        replay (Replay, optional): Brings the taps again.
        stage (int): Index of the stage, for ``replay``. Defaults to 0.
        compute (torch.dtype, optional): Type of the products. Defaults to
            that of autocast where it is on, else to that of the factors.
    """

    def __init__(
        self,
        factors: Tensor,
        codec: TapCodec | None,
        replay: Replay | None = None,
        stage: int = 0,
        compute: torch.dtype | None = None,
    ) -> None:
        self.factors = factors
        self.codec = codec
        self.replay = replay
        self.stage = stage
        self.compute = compute
        self._first: Tensor | None = None  # in the type of the products
        self._projected: Tensor | None = None  # (N, K, r)
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._shape: torch.Size | None = None

    def add(self, index: int, tap: Tensor) -> None:
        """Take in a tap (B, L, C); it is kept only if gradients are on.

        Args:
            index (int): Of its factor.
            tap (Tensor): The tap.
        """
        flat = tap.detach().flatten(0, -2)
        self._shape = tap.shape
        if _plainly():
            self._kept[index] = (flat,)
            return
        with torch.no_grad(), autocast_off(tap):
            if self._projected is None:
                self._begin(tap)
            product(
                flat.to(self._first.dtype),
                self._first[index],
                out=self._projected[:, index],
            )
        keeps = torch.is_grad_enabled() and self.codec is not None
        self._kept[index] = self.codec.encode(flat) if keeps else ()

    def _begin(self, tap: Tensor) -> None:
        first = self.factors
        dtype = self.compute or autocast_dtype(tap) or first.dtype
        self._first = first.to(fast_dtype(dtype, tap.device))
        count, _, rank = first.shape
        self._projected = self._first.new_empty(
            tap.shape[:-1].numel(), count, rank
        )

    def _kept_tensors(self) -> list[Tensor]:
        """What is kept of all taps, in order; the image if they come again.

        Raises:
            RuntimeError: If a tap is missing.
        """
        if len(self._kept) != len(self.factors):
            raise RuntimeError(
                f'Expected {len(self.factors)} taps in stage {self.stage}, '
                f'but the trunk gave {len(self._kept)}. Name those that it '
                'gives in `tuner.taps`.'
            )
        kept = [t for i in sorted(self._kept) for t in self._kept[i]]
        if not kept and torch.is_grad_enabled() and self.codec is None:
            self.replay.want(self.stage)
            kept = [self.replay.image]
        return kept

    def _release(self) -> None:
        """Hold nothing: what backward needs is kept by its node."""
        self._projected, self._kept, self.replay = None, {}, None


def _plainly() -> bool:
    """Whether a graph is being written, which knows no function of ours."""
    return torch.jit.is_tracing() or (
        torch.compiler.is_compiling() and not torch.is_grad_enabled()
    )


def taken_again(
    codec: TapCodec | None,
    replay: Replay | None,
    stage: int,
    count: int,
    kept: tuple[Tensor, ...],
) -> list[tuple[Tensor, ...]]:
    """What was kept of each of ``count`` taps, or the taps that come again.

    Args:
        codec (TapCodec, optional): How taps were kept.
        replay (Replay, optional): Brings them again where they were not.
        stage (int): Index of the stage.
        count (int): The number of taps.
        kept (tuple[Tensor, ...]): What a node has kept of them.
    """
    if codec is None:
        taken = replay.take(stage, kept[0])
        return [(tap.flatten(0, -2),) for tap in taken]
    each = len(kept) // count
    return [kept[i : i + each] for i in range(0, len(kept), each)]
