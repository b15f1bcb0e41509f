"""LoRand: adapters whose weights are sums of low-rank products."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.tuners.adapter import on_branch
from e3va_mm.tuners.base import BlockOptions, BlockTuner
from e3va_mm.tuners.insertion import Insertion
from e3va_mm.utils.options import option, whole


class LoRandLinear(nn.Module):
    """``y = x W + b`` with ``W = sum over branches of A g B``.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        rank (int): Inner width of each branch.
        branches (int): Number of branches.
        zero (bool): Start with a product of zero. Defaults to False.

    Shapes of the parameters: ``a`` (branches, in, rank), ``g`` (branches,
    rank, rank), ``b`` (branches, rank, out), ``bias`` (out,).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        branches: int,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(branches, in_channels, rank))
        self.g = nn.Parameter(torch.empty(branches, rank, rank))
        self.b = nn.Parameter(torch.empty(branches, rank, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        for factor in (self.a, self.g, self.b):
            for branch in factor:
                # Kaiming, over what a factor sums up.
                nn.init.kaiming_uniform_(branch.detach().t(), a=5**0.5)
        if zero:
            nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = (self.a @ self.g @ self.b).sum(0)
        return F.linear(x, weight.t().to(x.dtype), self.bias.to(x.dtype))


class LoRandAdapter(nn.Module):
    """Down to half the channels, GELU, up; zero before the first step."""

    def __init__(self, channels: int, rank: int, branches: int) -> None:
        super().__init__()
        half = channels // 2
        self.down = LoRandLinear(channels, half, rank, branches)
        self.up = LoRandLinear(half, channels, rank, branches, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.up(F.gelu(self.down(x)))


@dataclass(frozen=True, kw_only=True)
class LoRandOptions(BlockOptions):
    """Options of :class:`LoRand`, beside those of :class:`BlockOptions`.

    Attributes:
        rank (int): Inner width of a branch. Defaults to 8.
        branches (int): Products summed to a weight. 2 fit the published
            1.20 M on Swin-B; the public code has 4. Defaults to 2.
    """

    rank: int = option(8, whole())
    branches: int = option(2, whole())


@MODELS.register_module()
class LoRand(BlockTuner):
    """Two low-rank adapters in every block, on the branch outputs.

    `1% VS 100% <https://arxiv.org/abs/2306.04356>`_, Sec. 3.2:

        ``x <- x + a + A_1(a)`` with the output ``a`` of attention, and the
        same with that of the MLP, each as stochastic depth leaves it.

    The up projection starts at zero here, so that the tuned backbone begins
    as the stock one; the public code starts it as the others.

    Args:
        **options: See :class:`LoRandOptions`.
    """

    OPTIONS = LoRandOptions

    def make(self, channels: int) -> LoRandAdapter:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return LoRandAdapter(
            channels, self.options.rank, self.options.branches
        )

    def insertion(self, adapter: nn.Module, last: bool) -> Insertion:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return partial(on_branch, adapter)
