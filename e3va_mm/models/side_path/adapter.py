"""The dual low-rank adapter of E3VA.

`Parameter-efficient is not sufficient
<https://arxiv.org/abs/2306.09729>`_ (E3VA), Sec. 3; the factorised projections
follow `1% VS 100% <https://arxiv.org/abs/2306.04356>`_ (LoRand) by the same
authors.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...utils import is_number, is_whole
from ..grid import on_grid


class LowRankLinear(nn.Module):
    """``y = x P Q + b``: a linear layer whose weight has a bounded rank.

    Two branches of rank 8 summed, as the paper draws them, are the same
    functions as one product of rank 16.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        rank (int): Inner width of the product ``P Q``.

    Shapes of the parameters: ``p`` (in_channels, rank), ``q`` (rank,
    out_channels), ``bias`` (out_channels,).
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__()
        # Not read from the factors: FSDP flattens them.
        self.sizes = dict(
            in_channels=in_channels, out_channels=out_channels, rank=rank
        )
        # Both factors keep the scale of what they are given.
        self.p = nn.Parameter(
            torch.randn(in_channels, rank) / math.sqrt(in_channels)
        )
        self.q = nn.Parameter(
            torch.randn(rank, out_channels) / math.sqrt(rank)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_channels) -> (..., out_channels)."""
        return x @ self.p @ self.q + self.bias

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` shows them."""
        return ', '.join(f'{name}={size}' for name, size in self.sizes.items())


class Grid(NamedTuple):
    """Where the tokens of pictures lie; those before a map lie nowhere."""

    batch: int
    size: tuple[int, int]  # (H, W)

    def mix(self, tokens: Tensor, kernel: Tensor) -> Tensor:
        """Add a depth-wise convolution, zero where there is no map.

        Args:
            tokens (Tensor): (N, r), those of all pictures.
            kernel (Tensor): (r, 1, k, k), k odd.

        Returns:
            Tensor: (N, r).
        """

        def convolved(maps: Tensor) -> Tensor:
            padding = kernel.shape[-1] // 2
            return maps + F.conv2d(
                maps, kernel, padding=padding, groups=len(kernel)
            )

        tokens = tokens.unflatten(0, (self.batch, -1))
        return on_grid(tokens, self.size, convolved).flatten(0, 1)


class LowRankAdapter(nn.Module):
    """``A(x) = GELU(x P1 Q1 + b1) P2 Q2 + b2``, zero before the first step.

    Symbols: the paper's ``m`` is ``channels``, its bottleneck ``n`` is
    ``channels * bottleneck_ratio``. Beyond the paper, each off by default:
    ``x`` standardised over its channels, ``z + DW(z)`` in place of ``z =
    x P1``, and ``u s`` in place of the inner vector ``u`` before ``Q2``.

    Args:
        channels (int): Channels ``m`` of the tap.
        rank (int): Inner rank ``r`` of both projections. Defaults to 16.
        bottleneck_ratio (float): ``n / m``, at most 16. Defaults to 0.5.
        kernel_size (int, optional): Width ``k`` of the depth-wise convolution
            ``DW`` over the token grid, odd. Defaults to None for none.
        scale (bool): Whether a scale ``s``, at first 1, is learned. Defaults
            to False.
        norm (bool): Whether tokens are standardised. Defaults to False.

    Raises:
        ConfigError: If the bottleneck would be empty, ``rank`` is no whole
            number in ``[1, n]`` or ``kernel_size`` no odd number above 1.
    """

    def __init__(
        self,
        channels: int,
        rank: int = 16,
        bottleneck_ratio: float = 0.5,
        kernel_size: int | None = None,
        scale: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if not (is_number(bottleneck_ratio) and 0 < bottleneck_ratio <= 16):
            raise ConfigError(
                '`side_path.bottleneck_ratio` should be a number above 0, at '
                f'most 16, but got {bottleneck_ratio!r}.'
            )
        bottleneck = int(channels * bottleneck_ratio)
        if bottleneck < 1:
            raise ConfigError(
                '`side_path.bottleneck_ratio` should leave at least one '
                f'channel, but {bottleneck_ratio} of {channels} channels is '
                'none. Raise it.'
            )
        if not is_whole(rank, 1, bottleneck):
            raise ConfigError(
                f'`side_path.rank` should be in [1, {bottleneck}] (the '
                f'bottleneck of a stage of {channels} channels), but got '
                f'{rank!r}. Give a whole number, not above the bottleneck; '
                '`side_path.bottleneck_ratio` raises that.'
            )
        if kernel_size is not None and not (
            is_whole(kernel_size, 3, 31) and kernel_size % 2
        ):
            raise ConfigError(
                '`side_path.kernel_size` should be None or an odd number in '
                f'[3, 31], but got {kernel_size!r}. Give 3 or 5 to begin with.'
            )
        self.norm = norm
        self.down = LowRankLinear(channels, bottleneck, rank)
        self.up = LowRankLinear(bottleneck, channels, rank)
        nn.init.zeros_(self.up.q)
        self.kernel = self.scale = None
        if kernel_size is not None:
            # Keeps the scale of the projection, as the factors do.
            self.kernel = nn.Parameter(
                torch.randn(rank, 1, kernel_size, kernel_size) / kernel_size
            )
        if scale:
            self.scale = nn.Parameter(torch.ones(1))

    def forward(
        self, x: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """(B, L, channels) -> (B, L, channels).

        Args:
            x (Tensor): (B, L, channels); of any shape before the channels
                without ``kernel_size``.
            size (tuple[int, int], optional): (H, W) of the last H * W tokens;
                read with ``kernel_size``.
        """
        if self.norm:
            x = F.layer_norm(x, x.shape[-1:])
        down, up = self.down, self.up
        z = x @ down.p
        if self.kernel is not None:
            grid = Grid(len(z), size)
            z = grid.mix(z.flatten(0, 1), self.kernel).view_as(z)
        u = F.gelu(z @ down.q + down.bias) @ up.p
        if self.scale is not None:
            u = u * self.scale
        return u @ up.q + up.bias
