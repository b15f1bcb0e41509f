"""The gradient highway of E3VA (`paper <https://arxiv.org/abs/2306.09729>`_).

A side path sees a trunk as stages of blocks with named taps and a frozen
downsampling between stages; it knows no backbone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Downsampling, Size, StageSpec, Trunk
from e3va_mm.tuners.base import Tuner
from e3va_mm.tuners.e3va.adapter import AdapterBank
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS, TapCodec
from e3va_mm.tuners.e3va.replay import Replay
from e3va_mm.tuners.e3va.stage_sum import (
    KeptSum,
    downsample_difference,
    downsample_linear,
    keep,
)
from e3va_mm.utils.options import (
    Options,
    flag,
    names,
    number,
    one_of,
    option,
    optional,
    per_stage,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class SidePathOptions(Options):
    """Options of every tuner beside a frozen trunk.

    Attributes:
        save_taps (str | Sequence[str]): How a tap is kept for backward:
            ``'exact'``, ``'bf16'``, standardised as ``'int8'`` with one scale
            a token or as ``'int4'`` with one for 128 channels, or
            ``'recompute'``: not at all, the trunk runs again. One for all
            stages or one for each, the last for all that follow. The forward
            pass is the same. Defaults to ``'exact'``.
        compute (str, optional): Type of the adapters' products: ``'fp32'``,
            ``'bf16'``, or ``'fp16'``, which needs a loss scale. Parameters,
            their gradients and sums over tokens stay in single precision.
            Defaults to the type of autocast where it is on, else to that of
            the parameters.
        train_output_norms (bool): Train ``norm0``...; they belong to the side
            path. Defaults to True.
    """

    save_taps: str | Sequence[str] = option(
        'exact', per_stage(one_of(*TAP_CODECS))
    )
    compute: str | None = option(None, one_of(None, *DTYPES))
    train_output_norms: bool = option(True, flag)


@dataclass(frozen=True, kw_only=True)
class E3VAOptions(SidePathOptions):
    """Options of :class:`E3VA`, beside those of :class:`SidePathOptions`.

    Attributes:
        rank (int | Sequence[int]): Inner rank of the adapters. One for all
            stages or one for each, the last for all that follow. Defaults to
            16.
        bottleneck_ratio (float): Bottleneck of the adapters relative to the
            channels, at most 16. Defaults to 0.5.
        taps (Sequence[str], optional): The taps of a block to read. Defaults
            to all that the trunk offers.
        downsampling (str): Form of the inherited downsampling,
            ``'difference'`` or ``'linear'``. Defaults to ``'difference'``.
    """

    rank: int | Sequence[int] = option(16, per_stage(whole()))
    bottleneck_ratio: float = option(0.5, number(above=0, most=16))
    taps: Sequence[str] | None = option(None, optional(names))
    downsampling: str = option('difference', one_of('difference', 'linear'))


class SidePath(Tuner):
    """A tuner beside a frozen trunk that runs without a graph.

    Attributes:
        taps (tuple[str, ...]): Names of the taps that it reads.
    """

    CHILD = 'side_path'
    HAS_GRAPH = False
    OPTIONS = SidePathOptions
    taps: tuple[str, ...] = ()

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        self.build(trunk.stages())
        return []

    def build(self, stages: Sequence[StageSpec]) -> 'SidePath':
        """Make what trains, for stages of a trunk."""
        return self

    def start(
        self,
        stage: int,
        inherited: Tensor | None,
        replay: Replay | None = None,
    ) -> Highway | None:
        """Begin a stage; the state for the other methods.

        Args:
            stage (int): Index of the stage.
            inherited (Tensor, optional): (B, L, C) from :meth:`inherit`, or
                None for zero.
            replay (Replay, optional): What brings the taps again; read with
                ``save_taps='recompute'``.
        """

    def add_tap(
        self, highway: Highway, stage: int, block: int, tap: str, value: Tensor
    ) -> None:
        """Add what one tap contributes.

        Args:
            highway (Highway): The state of the stage; changed.
            stage (int): Index of the stage.
            block (int): Index of the block in the stage.
            tap (str): Name of the tap, one of ``self.taps``.
            value (Tensor): (B, L, C), the tap.
        """

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """What a stage's output and the next stage read.

        Args:
            highway (Highway): The state at the end of the stage.
            trunk (Tensor): (B, extra + H * W, C), the trunk there.
            size (tuple[int, int]): (H, W).

        Returns:
            Tensor: (B, extra + H * W, C), the sum of both.
        """
        return trunk

    def inherit(
        self,
        highway: Highway,
        total: Tensor,
        trunk: Tensor,
        downsampling: Downsampling | None,
        kept: KeptSum | None = None,
    ) -> Tensor | None:
        """Carry the highway to the next stage.

        Args:
            highway (Highway): The state at the end of the stage.
            total (Tensor): (B, L, C), what :meth:`output` gave.
            trunk (Tensor): (B, L, C), the trunk at the end of the stage.
            downsampling (Downsampling, optional): The trunk's own, frozen;
                None if the next stage has the same tokens.
            kept (KeptSum, optional): What is kept of ``total`` already, for
                the output norm.

        Returns:
            Tensor, optional: (B, L', C'), what the next stage starts with.
        """


@MODELS.register_module(name=['E3VA', 'E3VASidePath'])
class E3VA(SidePath):
    r"""Parallel low-rank adapters on a highway beside a frozen trunk.

    In stage ``i``, over its blocks ``j`` and taps ``t`` (paper Sec. 3):

    .. math:: h_i = D_{i-1}(h_{i-1}) + \sum_j \sum_t A_{ijt}(tap_{ijt})

    and the stage's output is :math:`x_i + h_i`. ``D`` is the trunk's own
    frozen downsampling, in one of two forms that both keep zero at zero:

    * ``'difference'``: :math:`D(h) = PM(x + h) - PM(x)`;
    * ``'linear'``: :math:`D(h)` is ``PM`` of ``h`` without its norm.

    A norm on ``h`` alone would break the identity at initialisation, and its
    gradient would grow as ``h`` shrinks.

    Args:
        **options: See :class:`E3VAOptions`.

    Raises:
        ConfigError: If ``taps`` names what is not there, or the adapters
            cannot have the size asked for.
    """

    OPTIONS = E3VAOptions

    def build(self, stages: Sequence[StageSpec]) -> 'E3VA':
        """Make the adapters of some stages."""
        options, count = self.options, len(stages)
        self.taps = self._taps(stages[0].taps)
        modes = by_stage(options.save_taps, count)
        self.codecs = [TAP_CODECS[mode] for mode in modes]
        self.compute = DTYPES.get(options.compute)
        ranks = by_stage(options.rank, count)
        ratio = options.bottleneck_ratio
        self.stages = nn.ModuleList(
            AdapterBank(
                [f'{b}.{tap}' for b in range(spec.depth) for tap in self.taps],
                spec.channels,
                rank,
                ratio,
            )
            for spec, rank in zip(stages, ranks, strict=False)
        )
        return self

    def upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        for stage, bank in enumerate(self.stages):
            bank.stack(state, f'{prefix}stages.{stage}.')

    def _taps(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        taps = self.options.taps or self._default_taps(offered)
        if any(tap not in offered or taps.count(tap) > 1 for tap in taps):
            raise ConfigError(
                f'`tuner.taps` should name some of {offered}, each once, but '
                f'got {taps!r}.'
            )
        return tuple(taps)

    def _default_taps(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        return offered

    def codec_of_sums(self, stage: int) -> TapCodec | None:
        """How a sum of trunk and highway is kept for backward.

        A stage whose taps come again keeps its sums as the next keeps what it
        keeps: to bring a sum again would take the adapters.
        """
        return next(filter(None, self.codecs[stage:]), None)

    def start(
        self,
        stage: int,
        inherited: Tensor | None,
        replay: Replay | None = None,
    ) -> Highway:
        """See :class:`SidePath`."""
        return Highway(
            self.stages[stage],
            inherited,
            self.codecs[stage],
            replay,
            stage,
            self.compute,
        )

    def add_tap(
        self, highway: Highway, stage: int, block: int, tap: str, value: Tensor
    ) -> None:
        """See :class:`SidePath`."""
        highway.add(block * len(self.taps) + self.taps.index(tap), value)

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`SidePath`."""
        total = highway.sum()
        return trunk if total is None else trunk + total

    def inherit(
        self,
        highway: Highway,
        total: Tensor,
        trunk: Tensor,
        downsampling: Downsampling | None,
        kept: KeptSum | None = None,
    ) -> Tensor | None:
        """See :class:`SidePath`."""
        state = highway.sum()
        if state is None or downsampling is None:
            return state
        if self.options.downsampling == 'linear':
            return downsample_linear(state, downsampling)
        if kept is None:
            kept = keep(total, self.codec_of_sums(highway.stage))
        return downsample_difference(total, trunk, kept, downsampling)


def by_stage(value: object, stages: int) -> list:
    """One for each stage: the last of a list is for all that follow."""
    values = [*value] if isinstance(value, (list, tuple)) else [value]
    return values + values[-1:] * (stages - len(values))
