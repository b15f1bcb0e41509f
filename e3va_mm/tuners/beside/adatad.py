"""AdaTAD's sums of adapters outside the backbone."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.tuners.token_grid import on_grid
from e3va_mm.utils.options import number, option


@dataclass(frozen=True, kw_only=True)
class AdaTADOptions(SidePathOptions):
    """Options of :class:`AdaTAD`, beside those of :class:`SidePathOptions`.

    Attributes:
        ratio (float): Bottleneck relative to the channels. Defaults to 0.25.
    """

    ratio: float = option(0.25, number(above=0, most=16))


class ConvAdapter(nn.Module):
    """``gamma * up(u + conv(u))`` with ``u = GELU(down(x))``.

    ``conv`` is depth-wise 3x3, then 1x1.

    Args:
        channels (int): Channels ``C`` of the tokens.
        width (int): Channels of the bottleneck.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.up = nn.Linear(width, channels)
        self.gamma = nn.Parameter(torch.ones(1))
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, extra + H * W, C) and (H, W) -> (B, extra + H * W, C)."""
        u = F.gelu(self.down(x))
        u = on_grid(u, size, lambda m: m + self.pointwise(self.depthwise(m)))
        return self.gamma * self.up(u)


@MODELS.register_module()
class AdaTAD(StreamSidePath):
    r"""Adapters on the streams of a frozen trunk; their sum joins the output.

    The memory-saving form of `AdaTAD <https://arxiv.org/abs/2311.17241>`_
    (the paper's dagger):

    .. math:: y = x_L + \sum_j A_j(x_j)

    It starts as the stock backbone. Other than there, convolutions are over
    the grid, not over time; all blocks have an adapter, not the last half;
    and with stages of different resolution each has a sum of its own.

    Args:
        **options: See :class:`AdaTADOptions`.
    """

    OPTIONS = AdaTADOptions

    def make(self, spec: StageSpec, seen: int) -> nn.ModuleList:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        width = max(1, int(self.options.ratio * spec.channels))
        return nn.ModuleList(
            ConvAdapter(spec.channels, width) for _ in range(spec.depth)
        )

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        total = 0 if state.before is None else state.before
        for adapter, x in zip(
            self.stages[state.stage], state.taps, strict=True
        ):
            total = total + adapter(x, size)
        state.after = total
        return state.taps[-1] + total
