"""Mona: adapters with filters over the token grid."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.base import Size
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block
from e3va_mm.tuners.bottleneck import check_width
from e3va_mm.tuners.grid import GridFilters, on_grid
from e3va_mm.utils import is_number


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


@MODELS.register_module()
class Mona(PETLMethod):
    """Two adapters with vision filters in every block, behind residuals.

    `5%>100% <https://arxiv.org/abs/2408.08345>`_, Sec. 3:

        ``x <- x + attn; x <- x + M_1(x); x <- x + mlp; x <- x + M_2(x)``.

    The up projection starts at zero here, so that the tuned backbone begins
    as the stock one; the public code leaves it at torch's start.

    Args:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.
        dropout (float): Defaults to 0.1.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(self, bottleneck: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        check_width(bottleneck, 'bottleneck')
        if not (is_number(dropout) and 0 <= dropout < 1):
            raise ConfigError(
                '`method.dropout` should be a number from 0 to below 1, but '
                f'got {dropout!r}.'
            )
        self.bottleneck, self.dropout = bottleneck, dropout
        self.blocks = nn.ModuleList()

    def attach(self, stock: nn.Module, blocks: list[Block]) -> list:
        """See :class:`PETLMethod`."""
        for block in blocks:
            adapters = self._adapt(
                block,
                block.branches,
                MonaAdapter,
                self.bottleneck,
                self.dropout,
            )
            block.insert(
                {name: _OnGrid(each) for name, each in adapters.items()}
            )
        return []


class _OnGrid:
    """Adds ``M(stream + branch)``."""

    def __init__(self, adapter: MonaAdapter) -> None:
        self.adapter = adapter

    def __call__(self, stream, branch, size):
        """See ``Insertion``."""
        return self.adapter(stream + branch, size)
