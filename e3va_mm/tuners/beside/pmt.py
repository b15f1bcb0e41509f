"""PMT: lateral connections and late blocks on a frozen trunk."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size
from e3va_mm.tuners.beside.attention import AttentionBlock
from e3va_mm.tuners.beside.late import LateSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class PMTOptions(SidePathOptions):
    """Options of :class:`PMT`, beside those of :class:`SidePathOptions`.

    Attributes:
        laterals (int): Streams that it reads, evenly over the depth. Defaults
            to 4.
        blocks (int): Transformer blocks, as wide as the trunk. Defaults to 4;
            the paper has 6 on the small and base trunks.
    """

    laterals: int = option(4, whole())
    blocks: int = option(4, whole())


class Lateral(nn.Module):
    """``s * (x + mlp(x))``, the MLP half as wide as ``x``.

    Args:
        channels (int): Channels ``C`` of the tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.GELU(),
            nn.Linear(channels // 2, channels),
        )
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return (x + self.mlp(x)) * self.scale


@MODELS.register_module()
class PMT(LateSidePath):
    r"""A transformer on the sum of lateral connections from a frozen ViT.

    The decoder of `PMT <https://arxiv.org/abs/2603.25398>`_ without its
    queries, which are a head's:

    .. math:: y = T_n(... T_1(\sum_k s_k (x_k + M_k(x_k))))

    in place of the trunk's last output. It starts as in the paper, drawn.
    Other than there, tokens have no rotary positions: they bring those of the
    trunk.

    Args:
        **options: See :class:`PMTOptions`.

    Raises:
        ConfigError: If the trunk has stages, or not as many blocks.
    """

    OPTIONS = PMTOptions

    def make_late(self, channels: int, depth: int) -> None:
        """See :class:`~e3va_mm.tuners.beside.late.LateSidePath`."""
        count = self.options.laterals
        if count > depth:
            raise ConfigError(
                '`tuner.laterals` should be a whole number from 1 to the '
                f'{depth} blocks of the trunk, but got {count}.'
            )
        self.reads = tuple((i + 1) * depth // count - 1 for i in range(count))
        self.laterals = nn.ModuleList(Lateral(channels) for _ in self.reads)
        self.blocks = nn.ModuleList(
            AttentionBlock(channels, head=64)
            for _ in range(self.options.blocks)
        )

    def late(
        self, streams: dict[int, Tensor], trunk: Tensor, size: Size
    ) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.late.LateSidePath`."""
        x = sum(
            lateral(streams[number])
            for number, lateral in zip(self.reads, self.laterals, strict=True)
        )
        for block in self.blocks:
            x = block(x, size)
        return x
