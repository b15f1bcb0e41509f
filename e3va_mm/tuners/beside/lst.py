"""LST: a ladder of reduced width beside a frozen trunk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.attention import WINDOW, AttentionBlock
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole

# Of the gates' sigmoid, Sec. 3.2.
TEMPERATURE = 0.1


@dataclass(frozen=True, kw_only=True)
class LSTOptions(SidePathOptions):
    """Options of :class:`LST`, beside those of :class:`SidePathOptions`.

    Attributes:
        reduction (int): Channels of the trunk for one of the ladder. Defaults
            to 8.
    """

    reduction: int = option(8, whole())


class Rungs(nn.Module):
    """The part of a ladder beside one stage.

    Args:
        spec (StageSpec): The stage.
        width (int): Channels of the ladder.
        before (int, optional): Those in the stage before, of another
            resolution.
        window (int, optional): Side of attention's windows.
        joins (bool): Whether an output reads it.
    """

    def __init__(
        self,
        spec: StageSpec,
        width: int,
        before: int | None,
        window: int | None,
        joins: bool,
    ) -> None:
        super().__init__()
        self.inherit = None if before is None else nn.Linear(before, width)
        self.down = nn.ModuleList(
            nn.Linear(spec.channels, width) for _ in range(spec.depth)
        )
        self.gates = nn.Parameter(torch.zeros(spec.depth))
        self.blocks = nn.ModuleList(
            AttentionBlock(width, window, (window or 0) // 2 * (i % 2))
            for i in range(spec.depth)
        )
        self.up = None
        if joins:
            self.up = nn.Linear(width, spec.channels)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)


@MODELS.register_module()
class LST(StreamSidePath):
    r"""A narrow transformer that reads the trunk's stream at each block.

    `LST <https://arxiv.org/abs/2206.06522>`_, Sec. 3:

    .. math:: h_j = T_j(g_j D_j x_j + (1 - g_j) h_{j-1}), \quad y = x_L + U
        h_L

    with transformer blocks ``T`` and gates ``g = sigmoid(a / 0.1)``. It
    starts as the stock backbone: ``U`` starts at zero, and joins the trunk,
    which the paper leaves to the ladder. Blocks are drawn, not cut out of the
    trunk's weights. Where the trunk has stages, attention is in windows of 7
    and the ladder is averaged to the next stage's grid.

    Args:
        **options: See :class:`LSTOptions`.
    """

    OPTIONS = LSTOptions
    crosses = True

    def build(self, stages: Sequence[StageSpec]) -> 'LST':
        """Make a ladder beside stages of a trunk."""
        inherits = self.crosses and not self.plain
        widths = [
            max(1, spec.channels // self.options.reduction) for spec in stages
        ]
        window = None if self.plain else WINDOW
        before = [None, *widths] if inherits else [None] * len(stages)
        self.stages = nn.ModuleList(
            Rungs(spec, widths[i], before[i], window, i not in self.silent)
            for i, spec in enumerate(stages)
        )
        return self

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        rungs, h = self.stages[state.stage], 0
        if state.before is not None:
            h, grid = state.before
            if rungs.inherit is not None:
                maps = h.transpose(1, 2).unflatten(2, grid)
                maps = F.adaptive_avg_pool2d(maps, size)
                h = rungs.inherit(maps.flatten(2).transpose(1, 2))
        gates = torch.sigmoid(rungs.gates / TEMPERATURE)
        for gate, down, block, x in zip(
            gates, rungs.down, rungs.blocks, state.taps, strict=True
        ):
            h = block(gate * down(x) + (1 - gate) * h, size)
        state.after = h, size
        x = state.taps[-1]
        return x if rungs.up is None else x + rungs.up(h)
