"""How a tap is kept from the forward to the backward pass.

A tap is an activation of the frozen trunk: nothing flows back through it, but
the gradient of an adapter's first factor needs its values.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Tokens worked on at a time: their temporaries fit a processor's cache.
CHUNK = 4096


class TapCodec(ABC):
    """Turns a tap (N, C) into the tensors that are kept, and back.

    Token by token: rows of what is kept belong to the tokens, so that a part
    of a tap can be had from the same part of what is kept.
    """

    # A lossy tap keeps its projection (N, rank) too, in 16 bits, so that
    # little more than the gradient of the first factor is approximate.
    lossy = True

    @abstractmethod
    def encode(self, tap: Tensor) -> tuple[Tensor, ...]:
        """(N, C) -> what is kept, (N, ...) each."""

    @abstractmethod
    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What was kept -> (N, C) in ``dtype``."""


class ExactTaps(TapCodec):
    """Keeps the tap as it came."""

    lossy = False

    def encode(self, tap: Tensor) -> tuple[Tensor]:
        """(N, C) -> the same tensor, unless it is cut out of a larger one."""
        size = tap.numel() * tap.element_size()
        if tap.untyped_storage().nbytes() > size:  # windows were padded
            tap = tap.clone()
        return (tap,)

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        return kept[0].to(dtype)


class BF16Taps(ExactTaps):
    """Keeps the tap in bfloat16: 8 bits of precision, full range."""

    lossy = True

    def encode(self, tap: Tensor) -> tuple[Tensor]:
        """(N, C) -> (N, C) in bfloat16."""
        return super().encode(tap.to(torch.bfloat16))


class Int8Taps(TapCodec):
    """Keeps the tap in 8 bits, with one scale a token.

    The error of a value is at most 1/254 of the largest in its token: where
    few channels are far larger than the rest, the rest is kept coarsely.
    """

    def encode(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, C) in int8 and scales (N, 1) in float32."""
        values = torch.empty_like(tap, dtype=torch.int8)
        scale = tap.new_empty((len(tap), 1), dtype=torch.float32)
        for part, coded, by in _in_parts(tap, values, scale):
            part = part.float()
            # On CPU several times as fast as `aminmax`, or as a norm.
            largest = torch.maximum(part.amax(-1, True), -part.amin(-1, True))
            # Zeros, and what is less than has a reciprocal.
            by.copy_(largest.div_(127).clamp_(min=torch.finfo(by.dtype).tiny))
            coded.copy_(torch.mul(part, by.reciprocal()).round_())
        return values, scale

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        values, scale = kept
        # In single precision: float16 has no room for the small scales.
        return values.float().mul_(scale).to(dtype)


class Int4Taps(TapCodec):
    """Keeps the tap in 4 bits, with one scale for 32 channels of a token.

    The error of a value is at most 1/16 of the largest among its 32: coarser
    than 8 bits, but a channel far larger than the rest costs only its own
    neighbours their precision.
    """

    GROUP = 32

    def encode(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, C / 2) in uint8 and scales (N, C / 32) in bfloat16."""
        tokens, channels = tap.shape
        group = self._group(channels)
        codes = tap.new_empty((tokens, channels // 2), dtype=torch.uint8)
        scale = tap.new_empty(
            (tokens, channels // group), dtype=torch.bfloat16
        )
        for part, coded, by in _in_parts(tap, codes, scale):
            groups = part.float().unflatten(-1, (-1, group))
            largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
            by.copy_(largest.div_(8))
            # Sixteen levels at -7.5, -6.5, ... 7.5 scales. A group of zeros
            # has a scale of zero; whatever its codes are, times it they are
            # zero.
            divisor = by.float().masked_fill_(by == 0, 1.0)[..., None]
            levels = groups.div(divisor).floor_().add_(8).clamp_(0, 15)
            low, high = levels.to(torch.uint8).flatten(-2).chunk(2, -1)
            coded.copy_(high.bitwise_left_shift(4).bitwise_or_(low))
        return codes, scale

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        codes, scale = kept
        half = codes.shape[-1]
        tap = codes.new_empty((len(codes), 2 * half), dtype=dtype)
        tap[:, :half] = codes & 15
        tap[:, half:] = codes >> 4
        groups = tap.sub_(7.5).unflatten(-1, (-1, self._group(2 * half)))
        groups.mul_(scale.to(dtype)[..., None])
        return tap

    def _group(self, channels: int) -> int:
        return math.gcd(channels, self.GROUP)


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of each, some at a time."""
    return zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)


# None: nothing is kept, the trunk runs again in backward.
TAP_CODECS: dict[str, TapCodec | None] = {
    'exact': ExactTaps(),
    'bf16': BF16Taps(),
    'int8': Int8Taps(),
    'int4': Int4Taps(),
    'recompute': None,
}
