"""Res-Tuning's bypass beside a frozen trunk."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.bottleneck import Bottleneck
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class ResTuningOptions(SidePathOptions):
    """Options of :class:`ResTuning`, beside :class:`SidePathOptions`.

    Attributes:
        bottleneck (int): Channels of the bottleneck of a tuner. Defaults to
            64; the published runs on classification have 10.
    """

    bottleneck: int = option(64, whole())


class BypassUnit(nn.Module):
    """``s R_h(x) + (1 - s) R_v(b)``, with ``R(x) = x + A(x)``.

    Args:
        channels (int): Channels ``C`` of the tokens.
        width (int): Channels of the bottlenecks ``A``.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.horizontal = Bottleneck(channels, width)
        self.vertical = Bottleneck(channels, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, stream: Tensor, bypass: Tensor) -> Tensor:
        """(B, L, C) twice -> (B, L, C)."""
        share = torch.sigmoid(self.gate)
        horizontal = stream + self.horizontal(stream)
        vertical = bypass + self.vertical(bypass)
        return share * horizontal + (1 - share) * vertical


@MODELS.register_module()
class ResTuning(StreamSidePath):
    r"""A bypass of tuners, which takes the place of the trunk's output.

    The memory-saving form of `Res-Tuning <https://arxiv.org/abs/2310.19859>`_
    (Sec. 3.3), with adapters as tuners:

    .. math:: b_j = s_j R_j(x_j) + (1 - s_j) R'_j(b_{j-1}), \quad y = b_L

    It starts as in the paper, not as the stock backbone: gates at one half,
    so that the output is a running mean of streams. The bypass begins with
    the stream behind the first block, in the paper with the one before it;
    and all adapters start at zero, there the last alone. Stages of different
    resolution begin anew.

    Args:
        **options: See :class:`ResTuningOptions`.
    """

    OPTIONS = ResTuningOptions

    def make(self, spec: StageSpec, seen: int) -> nn.ModuleList:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        return nn.ModuleList(
            BypassUnit(spec.channels, self.options.bottleneck)
            for _ in range(spec.depth)
        )

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        bypass = state.taps[0] if state.before is None else state.before
        for unit, x in zip(self.stages[state.stage], state.taps, strict=True):
            bypass = unit(x, bypass)
        state.after = bypass
        return bypass
