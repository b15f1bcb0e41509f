"""LoSA: low-rank mixers beside a frozen trunk."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.bottleneck import Bottleneck
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.tuners.token_grid import on_grid
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class LoSAOptions(SidePathOptions):
    """Options of :class:`LoSA`, beside those of :class:`SidePathOptions`.

    Attributes:
        rank (int): Inner rank over channels. Defaults to 16.
        token_rank (int): Inner rank over tokens. Defaults to 16.
        grid (int): Side of the grid on which the factors over tokens are
            learned. Defaults to 16.
    """

    rank: int = option(16, whole())
    token_rank: int = option(16, whole())
    grid: int = option(16, whole())


class TokenBottleneck(nn.Module):
    """``U GELU(D m)`` over the tokens of a map; zero before the first step.

    Args:
        rank (int): Inner rank ``r``.
        grid (int): Side of the grid of both factors, resized to the map's.
    """

    def __init__(self, rank: int, grid: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(1, rank, grid, grid) / grid)
        self.up = nn.Parameter(torch.zeros(1, rank, grid, grid))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        size = maps.shape[-2:]
        down, up = (
            F.interpolate(f, size, mode='bilinear')[0].to(maps.dtype)
            for f in (self.down, self.up)
        )
        # A sum over more tokens than were learned on is no larger.
        share = self.down[0, 0].numel() / (size[0] * size[1])
        inner = torch.einsum('bchw,rhw->bcr', maps, down) * share
        return torch.einsum('bcr,rhw->bchw', F.gelu(inner), up)


class LowRankMixer(nn.Module):
    """A low-rank MLP over channels, then one over tokens.

    Args:
        channels (int): Channels ``C`` of the tokens.
        options (LoSAOptions): Its ranks.
    """

    def __init__(self, channels: int, options: LoSAOptions) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels) for _ in range(2))
        self.channels = Bottleneck(channels, options.rank)
        self.tokens = TokenBottleneck(options.token_rank, options.grid)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """What is added to (B, extra + H * W, C), of grid (H, W)."""
        added = self.channels(self.norm1(x))
        normed = self.norm2(x + added)
        # Tokens that are no part of the grid are not mixed.
        mixed = on_grid(normed, size, lambda maps: maps + self.tokens(maps))
        return added + (mixed - normed)


@MODELS.register_module()
class LoSA(StreamSidePath):
    """Mixers that refine the features of a frozen trunk block by block.

    `Time-, memory- and parameter-efficient visual adaptation
    <https://arxiv.org/abs/2402.02887>`_, Sec. 3:

        ``y_i = y_{i-1} + g_i(x_i + y_{i-1})``, the output ``x_L + y_L``.

    It starts as the stock backbone. Images have one size in the paper; for
    any, the factors over tokens are learned on a grid and resized. With
    stages of different resolution each begins anew.

    Args:
        **options: See :class:`LoSAOptions`.
    """

    OPTIONS = LoSAOptions

    def make(self, spec: StageSpec, seen: int) -> nn.ModuleList:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        return nn.ModuleList(
            LowRankMixer(spec.channels, self.options)
            for _ in range(spec.depth)
        )

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        y = 0 if state.before is None else state.before
        for mixer, x in zip(self.stages[state.stage], state.taps, strict=True):
            y = y + mixer(x + y, size)
        state.after = y
        return state.taps[-1] + y
