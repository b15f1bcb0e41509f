"""A transformer block, for side networks that attend."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.trunks import Size
from e3va_mm.tuners.token_grid import on_grid

HEAD = 16  # channels, in a narrow network
# Side of windows on trunks with stages, whose first maps have too many tokens
# to attend to all.
WINDOW = 7


def heads_of(channels: int, head: int) -> int:
    """The most heads that part channels evenly, each of ``head`` or more."""
    most = max(1, channels // head)
    return max(n for n in range(1, most + 1) if channels % n == 0)


class AttentionBlock(nn.Module):
    """``x <- x + attention(LN(x)); x <- x + mlp(LN(x))``.

    Args:
        channels (int): Channels of the tokens.
        window (int, optional): Side of the windows in which tokens attend.
            Defaults to none: each attends to all.
        shift (int): By how many tokens windows are shifted. Defaults to 0.
        head (int): Channels of a head, at least. Defaults to 16.
    """

    def __init__(
        self,
        channels: int,
        window: int | None = None,
        shift: int = 0,
        head: int = HEAD,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.heads = heads_of(channels, head)
        self.norm1, self.norm2 = (nn.LayerNorm(channels) for _ in range(2))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, extra + H * W, C) and (H, W) -> (B, extra + H * W, C)."""
        normed = self.norm1(x)
        if self.window is None:
            x = x + self.attend(normed)
        else:
            x = x + on_grid(normed, size, self._in_windows)
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _in_windows(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); padding and wrapping are seen."""
        side, (height, width) = self.window, maps.shape[2:]
        maps = F.pad(maps, (0, -width % side, 0, -height % side))
        maps = torch.roll(maps, (-self.shift, -self.shift), (2, 3))
        grid = maps.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        windows = grid.permute(0, 2, 4, 3, 5, 1)  # B, rows, columns, s, s, C
        mixed = self.attend(windows.flatten(0, 2).flatten(1, 2))
        grid = mixed.view(windows.shape).permute(0, 5, 1, 3, 2, 4)
        maps = grid.flatten(4, 5).flatten(2, 3)
        maps = torch.roll(maps, (self.shift, self.shift), (2, 3))
        return maps[:, :, :height, :width]
