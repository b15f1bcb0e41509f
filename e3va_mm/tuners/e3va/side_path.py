"""The gradient highway of E3VA (`paper <https://arxiv.org/abs/2306.09729>`_).

A side path sees a trunk as stages of blocks with named taps and a frozen
downsampling between stages; it knows no backbone. Another kind of side path is
another registered class with the members of :class:`E3VASidePath`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Downsampling, StageSpec
from e3va_mm.trunks.base import Size
from e3va_mm.tuners.e3va.adapter import LowRankAdapter
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS, TapCodec
from e3va_mm.tuners.e3va.replay import Replay
from e3va_mm.tuners.e3va.stage_sum import (
    KeptSum,
    downsample_difference,
    downsample_linear,
    keep,
)


@MODELS.register_module()
class E3VASidePath(nn.Module):
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
        stages (Sequence[StageSpec]): Channels, depth and taps of each stage.
        rank (int | Sequence[int]): Inner rank of the adapters. One for all
            stages or one for each, the last for all that follow. Defaults to
            16.
        bottleneck_ratio (float): Bottleneck of the adapters relative to the
            channels. Defaults to 0.5.
        taps (Sequence[str], optional): The taps of a block to read. Defaults
            to all that the trunk offers.
        downsampling (str): ``'difference'`` or ``'linear'``. Defaults to
            ``'difference'``.
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

    Raises:
        ConfigError: If ``taps``, ``downsampling``, ``save_taps`` or
            ``compute`` names what is not there, or the adapters cannot have
            the size asked for.
    """

    DOWNSAMPLINGS = ('difference', 'linear')

    def __init__(
        self,
        stages: Sequence[StageSpec],
        rank: int | Sequence[int] = 16,
        bottleneck_ratio: float = 0.5,
        taps: Sequence[str] | None = None,
        downsampling: str = 'difference',
        save_taps: str | Sequence[str] = 'exact',
        compute: str | None = None,
    ) -> None:
        super().__init__()
        offered = stages[0].taps
        if taps is None:
            taps = offered
        if (
            not isinstance(taps, (list, tuple))
            or not taps
            or any(tap not in offered or taps.count(tap) > 1 for tap in taps)
        ):
            raise ConfigError(
                f'`side_path.taps` should name at least one of {offered}, '
                f'but got {taps!r}. Name each once, in a list.'
            )
        self.taps = tuple(taps)
        if downsampling not in self.DOWNSAMPLINGS:
            raise ConfigError(
                '`side_path.downsampling` should be one of '
                f'{self.DOWNSAMPLINGS}, but got {downsampling!r}.'
            )
        modes = _for_each(save_taps, len(stages))
        if not modes or any(mode not in tuple(TAP_CODECS) for mode in modes):
            raise ConfigError(
                '`side_path.save_taps` should be one of '
                f'{tuple(TAP_CODECS)}, or one for each stage, but got '
                f'{save_taps!r}.'
            )
        if compute not in (None, *DTYPES):
            raise ConfigError(
                f'`side_path.compute` should be one of {(None, *DTYPES)}, but '
                f'got {compute!r}.'
            )
        ranks = _for_each(rank, len(stages))
        if not ranks:
            raise ConfigError(
                '`side_path.rank` should be a whole number, or one for each '
                f'stage, but got {rank!r}.'
            )
        self.downsampling = downsampling
        self.codecs = [TAP_CODECS[mode] for mode in modes]
        self.compute = DTYPES.get(compute)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        tap: LowRankAdapter(
                            spec.channels, own, bottleneck_ratio
                        )
                        for tap in self.taps
                    }
                )
                for _ in range(spec.depth)
            )
            for spec, own in zip(stages, ranks, strict=False)
        )

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
        """Begin a stage.

        Args:
            stage (int): Index of the stage.
            inherited (Tensor, optional): (B, L, C) from :meth:`inherit`, or
                None for zero.
            replay (Replay, optional): What brings the taps again; read with
                ``save_taps='recompute'``.

        Returns:
            Highway: The state of the stage, for the other methods.
        """
        return Highway(
            inherited, self.codecs[stage], replay, stage, self.compute
        )

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
        highway.add(self.stages[stage][block][tap], value)

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """What a stage's output and the next stage read.

        Args:
            highway (Highway): The state at the end of the stage.
            trunk (Tensor): (B, extra + H * W, C), the trunk there.
            size (tuple[int, int]): (H, W).

        Returns:
            Tensor: (B, extra + H * W, C), the sum of both.
        """
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
        state = highway.sum()
        if state is None or downsampling is None:
            return state
        if self.downsampling == 'linear':
            return downsample_linear(state, downsampling)
        if kept is None:
            kept = keep(total, self.codec_of_sums(highway.stage))
        return downsample_difference(total, trunk, kept, downsampling)


def _for_each(value: object, stages: int) -> list:
    """One for each stage: the last of a sequence is for all that follow."""
    several = isinstance(value, (list, tuple))
    values = [*value] if several else [value]
    return values + values[-1:] * (stages - len(values))
