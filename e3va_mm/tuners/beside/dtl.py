"""DTL: a compact side network of low-rank products."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.tuners.token_grid import on_grid
from e3va_mm.utils.options import number, option, whole


@dataclass(frozen=True, kw_only=True)
class DTLOptions(SidePathOptions):
    """Options of :class:`DTL`, beside those of :class:`SidePathOptions`.

    Attributes:
        rank (int): Inner rank. The paper has 2 on ViT, 4 on Swin. Defaults to
            4.
        beta (float): Of the Swish. Defaults to 100.
        kernel (int): Side of the depth-wise filter behind it (DTL+), which
            all blocks of a stage share. Defaults to 3.
    """

    rank: int = option(4, whole())
    beta: float = option(100.0, number(above=0))
    kernel: int = option(3, whole())


class CompactNetwork(nn.Module):
    """The low-rank products of a stage, and its filter.

    Args:
        spec (StageSpec): The stage.
        options (DTLOptions): Sizes.
    """

    def __init__(self, spec: StageSpec, options: DTLOptions) -> None:
        super().__init__()
        channels, rank = spec.channels, options.rank
        self.down = nn.ModuleList(
            nn.Linear(channels, rank, bias=False) for _ in range(spec.depth)
        )
        self.up = nn.ModuleList(
            nn.Linear(rank, channels, bias=False) for _ in range(spec.depth)
        )
        for up in self.up:
            nn.init.zeros_(up.weight)
        self.filter = nn.Conv2d(
            channels,
            channels,
            options.kernel,
            padding='same',
            groups=channels,
            bias=False,
        )


@MODELS.register_module()
class DTL(StreamSidePath):
    r"""Low-rank products of streams, summed from block to block.

    `DTL <https://arxiv.org/abs/2312.07856>`_, Sec. 3.2 (DTL+):

    .. math:: h_j = h_{j-1} + x_j W_j, \quad y = x_L + conv(h_L \sigma(\beta
        h_L))

    It starts as the stock backbone. The paper adds the last term behind each
    block of the last half, through which gradients travel then; here it is
    added behind a stage's end alone, and none enter the trunk. Stages of
    different resolution begin anew, as in its Swin.

    Args:
        **options: See :class:`DTLOptions`.
    """

    OPTIONS = DTLOptions

    def make(self, spec: StageSpec, seen: int) -> CompactNetwork:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        return CompactNetwork(spec, self.options)

    def run(self, state: Streams, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        network = self.stages[state.stage]
        h = 0 if state.before is None else state.before
        for down, up, x in zip(
            network.down, network.up, state.taps, strict=True
        ):
            h = h + up(down(x))
        state.after = h
        gated = h * torch.sigmoid(self.options.beta * h)
        return state.taps[-1] + on_grid(gated, size, network.filter)
