"""The dual low-rank adapter of E3VA.

`Parameter-efficient is not sufficient
<https://arxiv.org/abs/2306.09729>`_ (E3VA), Sec. 3; the factorised projections
follow `1% VS 100% <https://arxiv.org/abs/2306.04356>`_ (LoRand) by the same
authors.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError


class LowRankLinear(nn.Module):
    """``y = x P Q + b``: a linear layer whose weight has a bounded rank.

    Two branches of rank 8 summed, as the paper draws them, are the same
    functions as one product of rank 16.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        rank (int): Inner width of the product ``P Q``.

    Shapes of the parameters: ``p`` (in_channels, rank), ``q`` (rank,
    out_channels), ``bias`` (out_channels,).
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__()
        # Both factors keep the scale of what they are given.
        self.p = nn.Parameter(
            torch.randn(in_channels, rank) / math.sqrt(in_channels)
        )
        self.q = nn.Parameter(
            torch.randn(rank, out_channels) / math.sqrt(rank)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_channels) -> (..., out_channels)."""
        return x @ self.p @ self.q + self.bias


class LowRankAdapter(nn.Module):
    """``A(x) = GELU(x P1 Q1 + b1) P2 Q2 + b2``, zero before the first step.

    Symbols: the paper's ``m`` is ``channels``, its bottleneck ``n`` is
    ``channels * bottleneck_ratio``.

    Args:
        channels (int): Channels ``m`` of the tap.
        rank (int): Inner rank ``r`` of both projections. Defaults to 16.
        bottleneck_ratio (float): ``n / m``, at most 16. Defaults to 0.5.

    Raises:
        ConfigError: If ``rank`` is not in ``[1, n]``.
    """

    def __init__(
        self,
        channels: int,
        rank: int = 16,
        bottleneck_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        bottleneck = int(channels * bottleneck_ratio)
        if not 1 <= rank <= bottleneck:
            raise ConfigError(
                f'`tuner.rank` should be in [1, {bottleneck}] (the bottleneck '
                f'of a stage of {channels} channels), but got {rank!r}. Lower '
                'it, or raise `tuner.bottleneck_ratio`.'
            )
        self.down = LowRankLinear(channels, bottleneck, rank)
        self.up = LowRankLinear(bottleneck, channels, rank)
        nn.init.zeros_(self.up.q)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., channels)."""
        return self.up(F.gelu(self.down(x)))
