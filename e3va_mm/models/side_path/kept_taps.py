"""How a tap is kept from the forward to the backward pass.

A tap is an activation of the frozen trunk: nothing flows back through it, but
the gradient of an adapter's first factor needs its values.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class TapCodec(ABC):
    """Turns a tap (N, C) into the tensors that are kept, and back."""

    # A lossy tap keeps its exact projection (N, rank) too, so that only the
    # gradient of the first factor is approximate.
    lossy = True

    @abstractmethod
    def encode(self, tap: Tensor) -> tuple[Tensor, ...]:
        """(N, C) -> what is kept."""

    @abstractmethod
    def decode(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """What was kept -> (N, C) in ``dtype``."""


class ExactTaps(TapCodec):
    """Keeps the tap as it came."""

    lossy = False

    def encode(self, tap: Tensor) -> tuple[Tensor]:
        """(N, C) -> the same tensor."""
        return (tap,)

    def decode(self, kept: tuple[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        return kept[0].to(dtype)


class BF16Taps(ExactTaps):
    """Keeps the tap in bfloat16: 8 bits of precision, full range."""

    lossy = True

    def encode(self, tap: Tensor) -> tuple[Tensor]:
        """(N, C) -> (N, C) in bfloat16."""
        return (tap.to(torch.bfloat16),)


class Int8Taps(TapCodec):
    """Keeps the tap in 8 bits, with one scale a token.

    The error of a value is at most 1/254 of the largest in its token: where
    few channels are far larger than the rest, the rest is kept coarsely.
    """

    def encode(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, C) in int8 and scales (N, 1) in float32."""
        tap = tap.float()
        scale = tap.abs().amax(-1, keepdim=True).div_(127)
        # A token of zeros keeps a scale of one; zero times it is zero.
        scale.masked_fill_(scale == 0, 1.0)
        return (tap / scale).round_().to(torch.int8), scale

    def decode(
        self, kept: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """See :class:`TapCodec`."""
        values, scale = kept
        return values.to(dtype).mul_(scale.to(dtype))


TAP_CODECS: dict[str, TapCodec] = {
    'exact': ExactTaps(),
    'bf16': BF16Taps(),
    'int8': Int8Taps(),
}
