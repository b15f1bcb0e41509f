"""What side paths of others share: they read streams, by plain autograd."""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from e3va_mm.trunks import STREAM, Downsampling, Size, StageSpec, Trunk
from e3va_mm.tuners.e3va.side_path import SidePath


class Streams:
    """The state of a stage.

    Args:
        stage (int): Index of the stage.
        before (object, optional): What the stage before has left to it.

    Attributes:
        taps (list[Tensor]): (B, extra + H * W, C), the stream behind each
            block so far.
        after (object, optional): What is left to the next stage.
    """

    def __init__(self, stage: int, before: object | None) -> None:
        self.stage, self.before = stage, before
        self.taps: list[Tensor] = []
        self.after: object | None = None


class StreamSidePath(SidePath):
    """A side path that reads the residual stream behind each block.

    It runs at a stage's end, where the grid is known. What it keeps for
    backward is what autograd keeps: ``save_taps`` and ``compute`` have no
    effect; autocast has.

    Attributes:
        plain (bool): Whether the trunk has one resolution.
        silent (set[int]): Stages without an output.
        crosses (bool): Whether what is left to the next stage passes a
            change of resolution; else it begins anew there. Defaults to
            False.
    """

    taps = (STREAM,)
    crosses = False

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        self.plain = trunk.layout.plain
        self.crosses = self.crosses and trunk.highway_goes_on
        self.silent = set(range(len(trunk.blocks))) - set(trunk.out_stages)
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'StreamSidePath':
        """Make one part for each stage, see :meth:`make`."""
        depths = [spec.depth for spec in stages]
        seen = accumulate(depths) if self.plain else depths
        self.stages = nn.ModuleList(
            nn.Identity() if self._is_idle(i) else self.make(spec, count)
            for i, (spec, count) in enumerate(zip(stages, seen, strict=True))
        )
        return self

    def _is_idle(self, stage: int) -> bool:
        """Whether no output reads what is beside a stage."""
        return stage in self.silent and not self.crosses

    def make(self, spec: StageSpec, seen: int) -> nn.Module:
        """What trains beside a stage.

        Args:
            spec (StageSpec): The stage.
            seen (int): Blocks of this resolution up to its end.
        """
        raise NotImplementedError

    def run(self, state: Streams, size: Size) -> Tensor:
        """What a stage's output and the next stage read.

        Args:
            state (Streams): Of the stage, with all taps; ``after`` is set.
            size (tuple[int, int]): (H, W).

        Returns:
            Tensor: (B, extra + H * W, C), in place of the trunk there.
        """
        raise NotImplementedError

    def start(
        self, stage: int, inherited: object | None, replay: object = None
    ) -> Streams:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        return Streams(stage, inherited)

    def add_tap(
        self, highway: Streams, stage: int, block: int, tap: str, value: Tensor
    ) -> None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        highway.taps.append(value.detach())

    def output(self, highway: Streams, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        if self._is_idle(highway.stage):
            return trunk
        return self.run(highway, size).to(trunk.dtype)

    def inherit(
        self,
        highway: Streams,
        total: Tensor,
        trunk: Tensor,
        downsampling: Downsampling | None,
        kept: object = None,
    ) -> object | None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        if downsampling is None or self.crosses:
            return highway.after
        return None
