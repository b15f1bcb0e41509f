"""How a tap is kept from the forward to the backward pass.

A tap is an activation of the frozen trunk: nothing flows back through it, but
the gradient of an adapter's first factor needs its values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from e3va_mm.numerics.products import product, transposed_product, wide_dtype
from e3va_mm.numerics.temporaries import runs_as_on_gpu, temporary_bytes
from e3va_mm.tuners.e3va import tap_codes, tap_ops

# A tap that is cut out of a larger tensor is kept as it is if that has at most
# this much more.
WASTE = 1 / 64


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

    def product(
        self, kept: Sequence[Tensor], factor: Tensor, out: Tensor
    ) -> None:
        """The tap times factor (C, r) into out (N, r)."""
        for rows in _portions(out, len(factor)):
            part = self.decode(self.rows(kept, rows), factor.dtype)
            product(part, factor, out=out[rows])

    def transposed_products(
        self, kept: list[Sequence[Tensor]], others: Tensor
    ) -> Tensor:
        """The taps' transposes times others.

        Args:
            kept (list[Sequence[Tensor]]): What was kept of K taps; emptied.
            others (Tensor): (N, K, r).

        Returns:
            Tensor: (K, C, r).
        """
        dtype = others.dtype
        if not runs_as_on_gpu(others.device):
            dtype = wide_dtype(dtype)
        _, count, rank = others.shape
        width = self.width(kept[0])
        found = others.new_empty(count, width, rank, dtype=dtype)
        for index in reversed(range(count)):
            tap = kept.pop()
            other = others[:, index]
            for rows in _portions(other, width):
                part = self._centred(self.rows(tap, rows), others.dtype)
                if rows.start:
                    found[index] += transposed_product(part, other[rows])
                else:
                    transposed_product(part, other[rows], out=found[index])
            del tap, part
        return found

    def width(self, kept: Sequence[Tensor]) -> int:
        """Channels of a tap."""
        return kept[0].shape[1]

    def _centred(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What :meth:`transposed_products` multiplies."""
        return self.decode(kept, dtype)


class ExactTaps(TapCodec):
    """Keeps the tap as it came."""

    lossy = False

    def encode(self, tap: Tensor) -> tuple[Tensor]:
        """(N, C) -> the same tensor, unless it is cut out of a larger one."""
        size = tap.numel() * tap.element_size()
        if tap.untyped_storage().nbytes() > size * (1 + WASTE):
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

    A value is ``mean + deviation * scale * level``. Kept are codes of the
    levels, scales (N, groups), and mean and deviation (2, C).

    Args:
        form (tap_codes.Form): How levels become codes.
    """

    def __init__(self, form: tap_codes.Form) -> None:
        self.form = form

    def encode(self, tap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C) -> codes, scales (N, groups), mean and deviation (2, C)."""
        tap = tap.contiguous()  # what kernels read
        channels = tap_ops.statistics(tap)
        return *tap_ops.encode(tap, channels, self.form), channels

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See :class:`TapCodec`."""
        mean, deviation = kept[2]
        # In single precision: float16 has no room for small values.
        standard = self._centred(kept, torch.float32)
        return standard.mul_(deviation).add_(mean).to(dtype)

    def rows(self, kept: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """See :class:`TapCodec`."""
        codes, scale, channels = kept
        return [codes[rows], scale[rows], channels]

    def transposed_products(
        self, kept: list[Sequence[Tensor]], others: Tensor
    ) -> Tensor:
        """See :class:`TapCodec`; channels wait for the smaller products."""
        if not runs_as_on_gpu(others.device):
            others = others.to(wide_dtype(others.dtype))
        channels = torch.stack([tap[2] for tap in kept])[..., None]
        mean, deviation = channels.unbind(1)  # (K, C, 1) each
        found = super().transposed_products(kept, others)
        wide = wide_dtype(found.dtype)
        sums = others.sum(0, dtype=wide)[:, None]
        return torch.addcmul(mean * sums, found.to(wide), deviation)

    def width(self, kept: Sequence[Tensor]) -> int:
        """See :class:`TapCodec`."""
        return kept[2].shape[1]

    def _centred(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(n, C), the channels of mean zero and deviation one."""
        codes, scale, channels = kept
        return tap_ops.decode(
            codes, scale, channels.shape[1], self.form, dtype
        )


def _portions(like: Tensor, channels: int) -> Iterator[slice]:
    """Tokens of (N, ...) that are there at a time, of so many channels."""
    room = temporary_bytes(like.device) // (channels * like.element_size())
    rows = max(1, room)
    for row in range(0, len(like), rows):
        yield slice(row, row + rows)


# None: nothing is kept, the trunk runs again in backward.
TAP_CODECS: dict[str, TapCodec | None] = {
    'exact': ExactTaps(),
    'bf16': BF16Taps(),
    'int8': IntegerTaps(tap_codes.INT8),
    'int4': IntegerTaps(tap_codes.INT4),
    'recompute': None,
}
