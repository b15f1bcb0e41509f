"""E3VA-Fusion: all streams of the trunk in few channels, mixed on the grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.numerics.autocast import (
    DTYPES,
    autocast_dtype,
    autocast_off,
)
from e3va_mm.numerics.products import linear, wide_dtype
from e3va_mm.registry import MODELS
from e3va_mm.trunks import STREAM, Downsampling, Size, StageSpec, Trunk
from e3va_mm.tuners.e3va.codes import Codes
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.tuners.e3va.mixer import mix
from e3va_mm.tuners.e3va.replay import Replay
from e3va_mm.tuners.e3va.side_path import (
    SidePath,
    SidePathOptions,
    by_stage,
)
from e3va_mm.tuners.token_grid import GridFilters, on_grid
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class E3VAFusionOptions(SidePathOptions):
    """Options of :class:`E3VAFusion`, beside :class:`SidePathOptions`.

    Attributes:
        rank (int): Channels of the code of one block. Defaults to 32.
    """

    rank: int = option(32, whole())


@MODELS.register_module()
class E3VAFusion(SidePath):
    r"""Low-rank codes of all blocks so far, fused for each output.

    .. math:: g_i = GELU(filters_i([P_j\,LN(x_j)]_{j \in i})), \qquad
        y_i = x_i + \sigma(x_i)\,U_i\,[g_1 \ldots g_i]

    with the stream :math:`x_j` behind block ``j`` of stage ``i``, a norm
    ``LN`` without parameters, filters over the grid
    (:class:`~e3va_mm.tuners.token_grid.GridFilters`), and the deviation
    :math:`\sigma` of a token's channels. Codes of earlier stages are made as
    coarse as the grid.

    E3VA's adapters read the branches as they are, and their sum joins the
    stream. The stream of a plain ViT grows from block to block, in DINOv2-S
    sixty times between the fourth and the last: what is learned for early
    outputs is nothing beside later ones. Here all are of one size. Not part
    of the paper.

    Args:
        **options: See :class:`E3VAFusionOptions`.
    """

    OPTIONS = E3VAFusionOptions
    taps = (STREAM,)

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        self._outputs = trunk.out_stages
        self._goes_on = trunk.highway_goes_on
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'E3VAFusion':
        """Make the factors and fusions of some stages."""
        rank = self.options.rank
        modes = by_stage(self.options.save_taps, len(stages))
        self.codecs = [TAP_CODECS[mode] for mode in modes]
        self.compute = DTYPES.get(self.options.compute)
        self.down, self.filters = nn.ParameterList(), nn.ModuleList()
        self.up, width = nn.ModuleDict(), 0
        for stage, spec in enumerate(stages):
            factors = torch.empty(spec.depth, spec.channels, rank)
            bound = spec.channels**-0.5
            self.down.append(nn.init.uniform_(factors, -bound, bound))
            self.filters.append(CodeFilters(spec.depth * rank))
            if not self._goes_on:  # codes end with their stage
                width = 0
            width += spec.depth * rank
            if stage in self._outputs:
                up = self.up[str(stage)] = nn.Linear(width, spec.channels)
                nn.init.zeros_(up.weight)
                nn.init.zeros_(up.bias)
        return self

    def start(
        self,
        stage: int,
        inherited: Sequence['Grid'] | None,
        replay: Replay | None = None,
    ) -> '_State':
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        codes = Codes(
            self.down[stage],
            self.codecs[stage],
            replay and StandardReplay(replay),
            stage,
            self.compute,
        )
        return _State(stage, codes, [*(inherited or ())])

    def add_tap(
        self,
        highway: '_State',
        stage: int,
        block: int,
        tap: str,
        value: Tensor,
    ) -> None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        highway.codes.add(block, standardise(value))

    def output(self, highway: '_State', trunk: Tensor, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        stage, length = highway.stage, size[0] * size[1]
        codes = highway.codes.codes()[:, -length:]
        dtype = self.compute or autocast_dtype(codes) or codes.dtype
        # What is kept of them is of the type of the products.
        codes = mix(self.filters[stage], codes.to(dtype), size, compute=dtype)
        highway.grids.append(Grid(codes, size))
        if str(stage) not in self.up:
            return trunk
        codes = torch.cat([g.tokens_at(size) for g in highway.grids], -1)
        added = _product(self.up[str(stage)], codes)
        extra, grid = trunk[:, :-length], trunk[:, -length:]
        wide = grid.to(wide_dtype(grid.dtype))
        deviation = wide.std(-1, keepdim=True).to(grid.dtype)
        total = grid + deviation * added
        return torch.cat([extra, total], 1) if extra.shape[1] else total

    def inherit(
        self,
        highway: '_State',
        total: Tensor,
        trunk: Tensor,
        downsampling: Downsampling | None,
        kept: object = None,
    ) -> list['Grid']:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        return highway.grids


class CodeFilters(GridFilters):
    """``GELU(filters(codes))``: (B, H * W, K * r) and (H, W) -> the same."""

    def forward(self, codes: Tensor, size: Size) -> Tensor:
        """See the class."""
        codes = codes.to(self.mix.weight.dtype)
        return F.gelu(on_grid(codes, size, super().forward))


class Grid(NamedTuple):
    """What a stage gives to the outputs behind it."""

    tokens: Tensor  # (B, H * W, K * r)
    size: Size  # (H, W)

    def tokens_at(self, size: Size) -> Tensor:
        """(B, H' * W', K * r), means over what a coarser grid unites."""
        if size == self.size:
            return self.tokens
        return on_grid(
            self.tokens, self.size, lambda x: F.adaptive_avg_pool2d(x, size)
        )


class _State(NamedTuple):
    stage: int
    codes: Codes
    grids: list[Grid]  # of the stages before, and of this at its end


class StandardReplay:
    """A replay whose taps are standardised.

    Args:
        replay (Replay): Brings the taps as the trunk gives them.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.want = replay.want

    @property
    def image(self) -> Tensor | None:
        """See :class:`Replay`."""
        return self._replay.image

    def take(self, stage: int, image: Tensor) -> list[Tensor]:
        """See :class:`Replay`."""
        return [*map(standardise, self._replay.take(stage, image))]


def _product(up: nn.Linear, codes: Tensor) -> Tensor:
    with autocast_off(codes):
        weight, bias = (p.to(codes.dtype) for p in (up.weight, up.bias))
        return linear(codes, weight, bias)


def standardise(tap: Tensor) -> Tensor:
    """(B, L, C), without a graph: each token with mean 0 and deviation 1."""
    tap = tap.detach()
    # Autocast would make it wide, and it is kept.
    return F.layer_norm(tap, tap.shape[-1:]).to(tap.dtype)
