"""Training an output norm that the frozen trunk reads on from."""

import torch
from torch import nn

from e3va_mm.tuners.e3va.stage_sum import TokenNorm


class NormOffset(nn.Module):
    """What an output norm differs by from the trunk's own.

    In some trunks (MiT, PVTv2, MSCAN, Twins) the norm of an output also feeds
    the next stage. There it stays frozen, and the output's weight and bias are
    its own plus these, which start at zero.

    Args:
        channels (int): Channels ``C`` of the norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, norm: nn.LayerNorm) -> TokenNorm:
        """The norm of the trunk -> that of the output."""
        return TokenNorm(
            norm.weight + self.weight, norm.bias + self.bias, norm.eps
        )
