"""The gradient highway of E3VA (`paper <https://arxiv.org/abs/2306.09729>`_).

A side path sees a trunk as stages of blocks with named taps and a frozen
downsampling between stages; it knows no backbone. Another kind of side path is
another registered class with the members of :class:`E3VASidePath`.
"""
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...errors import ConfigError
from ...registry import MODELS
from ..trunks import StageSpec
from .adapter import LowRankAdapter

Downsample = Callable[..., Tensor]


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
        rank (int): Inner rank of the adapters. Defaults to 16.
        bottleneck_ratio (float): Bottleneck of the adapters relative to the
            channels. Defaults to 0.5.
        taps (Sequence[str], optional): The taps of a block to read. Defaults
            to all that the trunk offers.
        downsampling (str): ``'difference'`` or ``'linear'``. Defaults to
            ``'difference'``.
        act_cfg (dict, optional): Activation of the adapters. Defaults to
            ``dict(type='GELU')``.

    Raises:
        ConfigError: If ``taps`` or ``downsampling`` names what is not there,
            or the adapters cannot have the size asked for.
    """

    DOWNSAMPLINGS = ('difference', 'linear')

    def __init__(self,
                 stages: Sequence[StageSpec],
                 rank: int = 16,
                 bottleneck_ratio: float = 0.5,
                 taps: Sequence[str] | None = None,
                 downsampling: str = 'difference',
                 act_cfg: dict | None = None) -> None:
        super().__init__()
        offered = stages[0].taps
        self.taps = tuple(offered if taps is None else taps)
        if not self.taps or not set(self.taps) <= set(offered):
            raise ConfigError(
                f'`side_path.taps` should name at least one of {offered}, '
                f'but got {taps}.')
        if downsampling not in self.DOWNSAMPLINGS:
            raise ConfigError(
                '`side_path.downsampling` should be one of '
                f'{self.DOWNSAMPLINGS}, but got {downsampling!r}.')
        self.downsampling = downsampling
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict({
                    tap: LowRankAdapter(spec.channels, rank, bottleneck_ratio,
                                        act_cfg)
                    for tap in self.taps
                }) for _ in range(spec.depth)) for spec in stages)

    def add_tap(self, highway: Tensor | None, stage: int, block: int,
                tap: str, value: Tensor) -> Tensor:
        """Add what one tap contributes to the highway.

        Args:
            highway (Tensor, optional): (B, L, C), or None for zero.
            stage (int): Index of the stage.
            block (int): Index of the block in the stage.
            tap (str): Name of the tap, one of ``self.taps``.
            value (Tensor): (B, L, C), the tap.

        Returns:
            Tensor: (B, L, C), the highway after the tap.
        """
        adapted = self.stages[stage][block][tap](value)
        return adapted if highway is None else highway + adapted

    def output(self, highway: Tensor | None, trunk: Tensor) -> Tensor:
        """(B, L, C) of the highway and of the trunk -> (B, L, C)."""
        return trunk if highway is None else trunk + highway

    def inherit(self, highway: Tensor | None, trunk: Tensor,
                trunk_next: Tensor, downsample: Downsample) -> Tensor | None:
        """Carry the highway to the next stage.

        Args:
            highway (Tensor, optional): (B, L, C), or None for zero.
            trunk (Tensor): (B, L, C), the trunk at the end of the stage.
            trunk_next (Tensor): (B, L', C'), the trunk after its
                downsampling.
            downsample (Callable): The trunk's frozen downsampling, (B, L, C)
                -> (B, L', C'); with ``linear=True`` without its norm.

        Returns:
            Tensor, optional: (B, L', C'), the highway of the next stage.
        """
        if highway is None:
            return None
        if self.downsampling == 'linear':
            return downsample(highway, linear=True)
        return downsample(trunk + highway) - trunk_next
