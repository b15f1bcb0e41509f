"""R2-Tuning: one block, from late layers of a frozen trunk to early ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.attention import WINDOW, AttentionBlock
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class R2TuningOptions(SidePathOptions):
    """Options of :class:`R2Tuning`, beside :class:`SidePathOptions`.

    Attributes:
        width (int): Channels of the block. Defaults to 256.
        steps (int): Layers that it reads, counted back from an output.
            Defaults to 4.
    """

    width: int = option(256, whole())
    steps: int = option(4, whole())


class RecurrentBlock(nn.Module):
    """``z <- T(g_k M(x_k) + (1 - g_k) z)``, the same block at each step.

    Args:
        channels (int): Channels of the tokens.
        steps (int): How often it runs.
        width (int): Channels inside.
        window (int, optional): Side of attention's windows.
    """

    def __init__(
        self, channels: int, steps: int, width: int, window: int | None
    ) -> None:
        super().__init__()
        self.map = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, width),
            nn.ReLU(),
            nn.LayerNorm(width),
            nn.Linear(width, width),
        )
        self.gates = nn.ParameterList(
            torch.zeros(()) for _ in range(steps - 1)
        )
        self.block = AttentionBlock(width, window)
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, taps: list[Tensor], size: Size) -> Tensor:
        """Streams (B, extra + H * W, C), the first first -> the same."""
        *others, z = taps
        z = self.block(self.map(z), size)
        for gate, x in zip(self.gates, others[::-1], strict=True):
            gate = gate.sigmoid()
            z = self.block(gate * self.map(x) + (1 - gate) * z, size)
        return self.up(z)


@MODELS.register_module()
class R2Tuning(StreamSidePath):
    """A recurrent block that refines late features by earlier ones.

    `R2-Tuning <https://arxiv.org/abs/2404.00801>`_, Sec. 3.2. What the
    paper does with a query in words and over time does not carry over:
    tokens are not pooled, and attend to each other (in windows of 7, where
    the trunk has stages). Each output has a block of its own, which is added
    to it and starts at zero, so that it starts as the stock backbone. With
    stages of different resolution no step leaves its stage.

    Args:
        **options: See :class:`R2TuningOptions`.
    """

    OPTIONS = R2TuningOptions

    def make(self, spec: StageSpec, seen: int) -> RecurrentBlock:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        return RecurrentBlock(
            spec.channels,
            min(self.options.steps, seen),
            self.options.width,
            None if self.plain else WINDOW,
        )

    def add_tap(
        self, highway: Streams, stage: int, block: int, tap: str, value: Tensor
    ) -> None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        super().add_tap(highway, stage, block, tap, value)
        del highway.taps[: -self.options.steps]

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        taps = [*(state.before or ()), *state.taps][-self.options.steps :]
        state.after = taps
        return taps[-1] + self.stages[state.stage](taps, size)
