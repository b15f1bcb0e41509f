"""Tokens that lie on a grid, and filters over it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def on_grid(
    tokens: Tensor,
    size: tuple[int, int],
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """A function of maps, applied to tokens that lie on a grid.

    Args:
        tokens (Tensor): (B, extra + H * W, C) or (B, H, W, C). The extra
            tokens stay as they are.
        size (tuple[int, int]): (H, W).
        function (Callable): (B, C, H, W) -> (B, C, H, W).

    Returns:
        Tensor: As ``tokens``.
    """
    if tokens.ndim == 4:
        return function(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    extra = tokens.shape[1] - size[0] * size[1]
    maps = tokens[:, extra:].transpose(1, 2).unflatten(2, size)
    done = function(maps).flatten(2).transpose(1, 2)
    if extra:
        done = torch.cat([tokens[:, :extra], done], 1)
    return done


class GridFilters(nn.Module):
    """``y = x + mean of depth-wise filters; y + 1x1 of y``.

    The filters of Mona (`5%>100% <https://arxiv.org/abs/2408.08345>`_,
    Sec. 3.2). Their mean is one filter of the largest side, and is run so.

    Args:
        channels (int): Channels of the map.
        kernels (Sequence[int]): Sides of the filters, odd. Defaults to
            (3, 5, 7).
    """

    def __init__(
        self, channels: int, kernels: Sequence[int] = (3, 5, 7)
    ) -> None:
        super().__init__()
        self.filters = nn.ModuleList(
            nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)
            for k in kernels
        )
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        weight, bias = self._merged()
        x = x + F.conv2d(
            x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
        )
        return x + self.mix(x)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the mean of the depth-wise filters."""
        side = max(each.kernel_size[0] for each in self.filters)
        weights = [
            F.pad(each.weight, [(side - each.kernel_size[0]) // 2] * 4)
            for each in self.filters
        ]
        biases = [each.bias for each in self.filters]
        return sum(weights) / len(weights), sum(biases) / len(biases)
