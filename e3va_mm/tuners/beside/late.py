"""What decoders of a frozen plain trunk share: they make its last output."""

from collections.abc import Sequence

from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Size, StageSpec, Trunk
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath


def require_plain(tuner: nn.Module, trunk: Trunk) -> None:
    """Refuse a trunk with stages of different resolution.

    Raises:
        ConfigError: If it has some.
    """
    if not trunk.layout.plain:
        raise ConfigError(
            f'{type(tuner).__name__} expects a trunk with one resolution, as '
            f'a plain ViT, but got {trunk.stock_class.__name__}. Take another '
            'tuner, such as LST.'
        )


def to_maps(tokens: Tensor, size: Size) -> Tensor:
    """(B, extra + H * W, C) and (H, W) -> (B, C, H, W)."""
    length = size[0] * size[1]
    return tokens[:, -length:].transpose(1, 2).unflatten(2, size)


class LateSidePath(StreamSidePath):
    """Makes the last output of a plain trunk of streams; the others stay.

    Attributes:
        reads (tuple[int, ...]): Blocks whose streams it reads, ascending.
    """

    reads: tuple[int, ...] = ()

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        require_plain(self, trunk)
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'LateSidePath':
        """Make what trains, see :meth:`make_late`."""
        depths = [spec.depth for spec in stages]
        self._first = [sum(depths[:i]) for i in range(len(depths))]
        self.make_late(stages[0].channels, sum(depths))
        return self

    def make_late(self, channels: int, depth: int) -> None:
        """Make what trains, for a trunk of so many channels and blocks."""
        raise NotImplementedError

    def late(
        self, streams: dict[int, Tensor], trunk: Tensor, size: Size
    ) -> Tensor:
        """The last output.

        Args:
            streams (dict[int, Tensor]): (B, extra + H * W, C), those of
                ``reads``.
            trunk (Tensor): The trunk there, as long.
            size (tuple[int, int]): (H, W).
        """
        raise NotImplementedError

    def start(
        self, stage: int, inherited: object | None, replay: object = None
    ) -> Streams:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        state = super().start(stage, inherited, replay)
        state.after = inherited or {}
        return state

    def add_tap(
        self, highway: Streams, stage: int, block: int, tap: str, value: Tensor
    ) -> None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        if self._first[stage] + block in self.reads:
            highway.after[self._first[stage] + block] = value.detach()

    def output(self, highway: Streams, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        if highway.stage < len(self._first) - 1:
            return trunk
        return self.late(highway.after, trunk, size).to(trunk.dtype)
