"""How a tap is kept from the forward to the backward pass.

A tap is an activation of the frozen trunk: nothing flows back through it, but
the gradient of an adapter's first factor needs its values.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from e3va_mm.numerics.products import transposed_product, wide_dtype

# Tokens worked on at a time: their temporaries fit a processor's cache.
CHUNK = 4096
# Tokens from which mean and deviation of the channels are taken.
SAMPLE = 1024
TINY = torch.finfo(torch.float32).tiny


class TapCodec(ABC):
    """Turns a tap (N, C) into the tensors that are kept, and back."""

    # A lossy tap keeps its projection (N, rank) too, in 16 bits, so that
    # little more than the gradient of the first factor is approximate.
    lossy = True

    @abstractmethod
    def encode(self, tap: Tensor) -> tuple[Tensor, ...]:
        """(N, C) -> what is kept, always as many tensors."""

    @abstractmethod
    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What was kept -> (N, C) in ``dtype``."""

    def rows(self, kept: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """What was kept of some of the tokens."""
        return [tensor[rows] for tensor in kept]

    def transposed_product(
        self, kept: Sequence[Tensor], other: Tensor
    ) -> Tensor:
        """Kept (N, C), other (N, r) -> the tap's transpose times other."""
        return transposed_product(self.decode(kept, other.dtype), other)


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


class IntegerTaps(TapCodec):
    """Keeps the tap as integers, after standardising its channels.

    Mean and deviation of every channel are kept apart; what is left of a
    token has one scale, or one for each group of channels. So channels far
    larger than the rest, which transformers have, cost the rest nothing.

    A value is ``mean + deviation * scale * level``, with a level from
    ``-steps`` to ``steps``.
    """

    steps: int
    # Channels that share a scale, None for all of a token.
    group: int | None
    scale_type: torch.dtype
    # The type of codes, and how many fit a value of it.
    code_type: torch.dtype
    codes_in_one = 1

    @abstractmethod
    def pack(self, levels: Tensor, out: Tensor) -> None:
        """(n, C) within ``steps``, which it may change, into codes."""

    @abstractmethod
    def unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes -> levels (n, C) in ``dtype``, a new tensor."""

    def encode(self, tap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C) -> codes, scales (N, groups), mean and deviation (2, C)."""
        tokens, width = tap.shape
        channels = _mean_and_deviation(tap)
        inverse = channels[1].reciprocal()
        offset = -channels[0] * inverse
        group = math.gcd(width, self.group or width)
        codes, scale = (
            tap.new_empty((tokens, -(-width // shared)), dtype=dtype)
            for dtype, shared in (
                (self.code_type, self.codes_in_one),
                (self.scale_type, group),
            )
        )
        for part, coded, by in _in_parts(tap, codes, scale):
            part = torch.addcmul(offset, part.float(), inverse)
            groups = part.unflatten(-1, (-1, group))
            # On CPU several times as fast as `aminmax`, or as a norm.
            largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
            # Zeros, and what is less than has a reciprocal.
            by.copy_(largest.div_(self.steps).clamp_(min=TINY))
            groups.mul_(by.float().reciprocal()[..., None])
            self.pack(part, coded)
        return codes, scale, channels

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        mean, deviation = kept[2]
        # In single precision: float16 has no room for small values.
        standard = self._standardised(kept, torch.float32)
        return standard.mul_(deviation).add_(mean).to(dtype)

    def rows(self, kept: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """See :class:`TapCodec`."""
        codes, scale, channels = kept
        return [codes[rows], scale[rows], channels]

    def transposed_product(
        self, kept: Sequence[Tensor], other: Tensor
    ) -> Tensor:
        """See :class:`TapCodec`; channels wait for the smaller product."""
        other = other.to(wide_dtype(other.dtype))
        mean, deviation = kept[2].to(other.dtype)[..., None]
        standard = self._standardised(kept, other.dtype)
        found = transposed_product(standard, other).mul_(deviation)
        return found.addmm_(mean, other.sum(0, True))

    def _standardised(
        self, kept: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """(n, C), the channels of mean zero and deviation one."""
        codes, scale, channels = kept
        levels = self.unpack(codes, dtype)[:, : channels.shape[1]]
        groups = levels.unflatten(-1, (scale.shape[1], -1))
        groups.mul_(scale.to(dtype)[..., None])
        return levels


class Int8Taps(IntegerTaps):
    """Keeps the tap in 8 bits, with one scale a token."""

    steps = 127
    group = None
    scale_type = torch.float32
    code_type = torch.int8

    def pack(self, levels: Tensor, out: Tensor) -> None:
        """See :class:`IntegerTaps`."""
        out.copy_(levels.round_())

    def unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`IntegerTaps`."""
        return codes.to(dtype)


class Int4Taps(IntegerTaps):
    """Keeps the tap in 4 bits, with one scale for 128 channels of a token."""

    steps = 8
    group = 128
    scale_type = torch.bfloat16
    code_type = torch.uint8
    codes_in_one = 2

    def pack(self, levels: Tensor, out: Tensor) -> None:
        """See :class:`IntegerTaps`."""
        # Sixteen levels at -7.5, -6.5, ... 7.5; the cast cuts.
        codes = levels.add_(8).clamp_(0, 15).to(torch.uint8)
        low, high = codes.split(out.shape[1], 1)
        out.copy_(low)
        out[:, : high.shape[1]] |= high << 4

    def unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`IntegerTaps`."""
        count, width = codes.shape
        levels = codes.new_empty((count, 2 * width), dtype=dtype)
        levels[:, :width] = codes & 15
        levels[:, width:] = codes >> 4
        return levels.sub_(7.5)


def _mean_and_deviation(tap: Tensor) -> Tensor:
    """Of each channel, about: (N, C) -> (2, C) in float32."""
    some = tap[:: -(-len(tap) // SAMPLE)].float()
    mean, square = some.mean(0), some.square().mean(0)
    # At least what rounding leaves of the difference.
    variance = torch.maximum(square - mean.square(), 1e-6 * square)
    return torch.stack([mean, variance.sqrt().clamp_(min=TINY)])


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
