"""Mona: adapters with filters over the token grid."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size
from e3va_mm.tuners.base import BlockOptions, BlockTuner
from e3va_mm.tuners.insertion import Insertion
from e3va_mm.tuners.token_grid import GridFilters, on_grid
from e3va_mm.utils.options import number, option, whole


class MonaAdapter(nn.Module):
    """What Mona adds to the tokens behind a residual.

    ``up(dropout(GELU(filters(down(gamma * LN(x) + gamma_x * x)))))``. The up
    projection starts at zero.

    Args:
        channels (int): Channels ``C`` of the tokens.
        width (int): Channels of the bottleneck.
        dropout (float): Share of the bottleneck that is dropped.
    """

    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))
        self.gamma_x = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, width)
        self.filters = GridFilters(width)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, L, C) or (B, H, W, C), and the grid (H, W) -> as ``x``."""
        x = self.down(self.norm(x) * self.gamma + x * self.gamma_x)
        x = on_grid(x, size, self.filters)
        return self.up(self.dropout(F.gelu(x)))


@dataclass(frozen=True, kw_only=True)
class MonaOptions(BlockOptions):
    """Options of :class:`Mona`, beside those of :class:`BlockOptions`.

    Attributes:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.
        dropout (float): In [0, 1). Defaults to 0.1.
    """

    bottleneck: int = option(64, whole())
    dropout: float = option(0.1, number(least=0, below=1))


@MODELS.register_module()
class Mona(BlockTuner):
    """Two adapters with vision filters in every block, behind residuals.

    `5%>100% <https://arxiv.org/abs/2408.08345>`_, Sec. 3:

        ``x <- x + attn; x <- x + M_1(x); x <- x + mlp; x <- x + M_2(x)``.

    The up projection starts at zero here, so that the tuned backbone begins
    as the stock one; the public code leaves it at torch's start.

    Args:
        **options: See :class:`MonaOptions`.
    """

    OPTIONS = MonaOptions

    def make(self, channels: int) -> MonaAdapter:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return MonaAdapter(
            channels, self.options.bottleneck, self.options.dropout
        )

    def insertion(self, adapter: nn.Module, last: bool) -> Insertion:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return partial(_on_grid, adapter)


def _on_grid(adapter: MonaAdapter, stream, branch, size) -> Tensor:
    """An ``Insertion``: ``M(stream + branch)``."""
    return adapter(stream + branch, size())
