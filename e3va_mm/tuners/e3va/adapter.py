"""The dual low-rank adapters of E3VA, those of a stage in one bank.

`Parameter-efficient is not sufficient
<https://arxiv.org/abs/2306.09729>`_ (E3VA), Sec. 3; the factorised projections
follow `1% VS 100% <https://arxiv.org/abs/2306.04356>`_ (LoRand) by the same
authors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError


class LowRankLinears(nn.Module):
    """``y_k = x_k P_k Q_k + b_k``: linear layers of bounded rank, in parallel.

    Two branches of rank 8 summed, as the paper draws them, are the same
    functions as one product of rank 16.

    Args:
        count (int): Their number ``K``.
        in_channels (int): Channels of the inputs.
        out_channels (int): Channels of the outputs.
        rank (int): Inner width of the products ``P Q``.

    Shapes of the parameters: ``p`` (K, in_channels, rank), ``q`` (K, rank,
    out_channels), ``bias`` (K, out_channels).
    """

    def __init__(
        self, count: int, in_channels: int, out_channels: int, rank: int
    ) -> None:
        super().__init__()
        # Both factors keep the scale of what they are given.
        self.p = nn.Parameter(
            torch.randn(count, in_channels, rank) / math.sqrt(in_channels)
        )
        self.q = nn.Parameter(
            torch.randn(count, rank, out_channels) / math.sqrt(rank)
        )
        self.bias = nn.Parameter(torch.zeros(count, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(K, N, in_channels) -> (K, N, out_channels)."""
        return x @ self.p @ self.q + self.bias[:, None]


class AdapterBank(nn.Module):
    """``A_k(x) = GELU(x P1_k Q1_k + b1_k) P2_k Q2_k + b2_k``, K of them.

    Zero before the first step. Symbols: the paper's ``m`` is ``channels``, its
    bottleneck ``n`` is ``channels * bottleneck_ratio``.

    Args:
        names (Sequence[str]): One for each adapter, under which files of
            earlier versions have its parameters.
        channels (int): Channels ``m`` of the taps.
        rank (int): Inner rank ``r`` of both projections. Defaults to 16.
        bottleneck_ratio (float): ``n / m``, at most 16. Defaults to 0.5.

    Raises:
        ConfigError: If ``rank`` is not in ``[1, n]``.
    """

    def __init__(
        self,
        names: Sequence[str],
        channels: int,
        rank: int = 16,
        bottleneck_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        bottleneck = int(channels * bottleneck_ratio)
        if bottleneck < 1:
            raise ConfigError(
                '`tuner.bottleneck_ratio` should leave a stage of '
                f'{channels} channels a bottleneck of at least one, but got '
                f'{bottleneck_ratio!r}. Raise it.'
            )
        if not 1 <= rank <= bottleneck:
            raise ConfigError(
                f'`tuner.rank` should be in [1, {bottleneck}] (the bottleneck '
                f'of a stage of {channels} channels), but got {rank!r}. Lower '
                'it, or raise `tuner.bottleneck_ratio`.'
            )
        self.names = tuple(names)
        count = len(self.names)
        self.down = LowRankLinears(count, channels, bottleneck, rank)
        self.up = LowRankLinears(count, bottleneck, channels, rank)
        nn.init.zeros_(self.up.q)

    def forward(self, x: Tensor) -> Tensor:
        """(K, N, channels) -> (K, N, channels)."""
        return self.up(F.gelu(self.down(x)))

    def __len__(self) -> int:
        return len(self.names)

    def stack(self, state: dict[str, Tensor], prefix: str) -> None:
        """Bring a state of earlier versions into the form of this one.

        They had the parameters of each adapter apart.

        Args:
            state (dict[str, Tensor]): The state; changed.
            prefix (str): That of the bank in it.
        """
        for own in self.state_dict():
            keys = [f'{prefix}{name}.{own}' for name in self.names]
            shapes = {getattr(state.get(key), 'shape', None) for key in keys}
            if len(shapes) == 1 and None not in shapes:
                parts = [state.pop(key) for key in keys]
                state[prefix + own] = torch.stack(parts)
