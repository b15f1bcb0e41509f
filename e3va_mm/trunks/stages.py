"""What a trunk tells of its stages, and what it hands out while it runs."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

Size = tuple[int, int]
# The tap that every block of every trunk has beside those of its branches:
# the residual stream behind it.
STREAM = 'stream'


class StageSpec(NamedTuple):
    """A stage as a side path sees it: channels, blocks, taps of a block."""

    channels: int
    depth: int
    taps: tuple[str, ...]


class StageEnd(NamedTuple):
    """The end of a stage."""

    tokens: Tensor  # (B, extra + H * W, C)
    size: Size  # (H, W)


# (stage, block, name of the tap, tap of shape (B, L, C))
OnTap = Callable[[int, int, str, Tensor], None]
# (stage, its end)
OnEnd = Callable[[int, StageEnd], None]


class Band(NamedTuple):
    """Rows of a grid that are downsampled without the others."""

    tokens: slice  # of the L before
    patches: slice  # of the L' after
    gather: Callable[..., Tensor]  # as that of the whole


class Downsampling(NamedTuple):
    """A frozen downsampling in two steps: gather and norm, then a product.

    Differences must be taken between the steps, before the product rounds to
    the type of the weight.
    """

    # (B, L, C) -> (B, L', G); `norm=False` leaves the norm out.
    gather: Callable[..., Tensor]
    # () -> (C', G), in the compute type; None where `gather` does it all.
    weight: Callable[[], Tensor] | None
    # Batch size -> some tokens at a time, in order; None for all.
    bands: Callable[[int], Iterable[Band]] | None = None
