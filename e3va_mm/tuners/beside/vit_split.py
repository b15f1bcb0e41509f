"""ViT-Split: trained copies of the last blocks, and a prior of frozen ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, Trunk
from e3va_mm.tuners.beside.late import (
    LateSidePath,
    copy_blocks,
    run_copy,
    to_maps,
)
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class ViTSplitOptions(SidePathOptions):
    """Options of :class:`ViTSplit`, beside those of :class:`SidePathOptions`.

    Attributes:
        copies (int): Blocks that are copied, counted from the last; fewer
            than the trunk has. Defaults to 2.
        priors (int): Streams of the prior head, of the last blocks. Defaults
            to 4.
    """

    copies: int = option(2, whole())
    priors: int = option(4, whole())


def fuse(inputs: int, channels: int) -> nn.Sequential:
    """(B, inputs, H, W) -> (B, channels, H, W): 1x1, then 3x3."""
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GELU(),
    )


@MODELS.register_module()
class ViTSplit(LateSidePath):
    """The last blocks run twice: frozen, and as a copy that trains.

    `ViT-Split <https://arxiv.org/abs/2506.03433>`_, Sec. 3: the copies (task
    head) go on from the frozen trunk; a prior head fuses its last streams; a
    fusion of both takes the place of the last output.

    A copy is kept as what it differs by from the trunk's weights, so that it
    starts as these whenever they are loaded, and weight decay draws it there.
    Heads start drawn, as in the paper, whose second convolutions are
    deformable.

    Args:
        **options: See :class:`ViTSplitOptions`.

    Raises:
        ConfigError: If the trunk has stages, not as many blocks, blocks that
            need more than tokens, or weights in 8 bits.
    """

    OPTIONS = ViTSplitOptions

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        body, count = trunk.body(), self.options.copies
        if count >= len(body):
            raise ConfigError(
                '`tuner.copies` of ViTSplit should be fewer than the '
                f'{len(body)} blocks of the trunk, but got {count}.'
            )
        # In a list, or the trunk would be asked for by state dicts.
        self._trunk, self._paths = [trunk], [p for p, _ in body[-count:]]
        self.copies = nn.ModuleList(copy_blocks(self, trunk, self._paths))
        with torch.no_grad():
            for parameter in self.copies.parameters():
                parameter.zero_()
        return super().attach(trunk)

    def make_late(self, channels: int, depth: int) -> None:
        """See :class:`~e3va_mm.tuners.beside.late.LateSidePath`."""
        priors = range(max(0, depth - self.options.priors), depth)
        self._before, self._priors = depth - len(self.copies) - 1, [*priors]
        self.reads = tuple(sorted({self._before, *priors}))
        self.prior = fuse(channels * len(priors), channels)
        self.fusion = fuse(2 * channels, channels)

    def late(
        self, streams: dict[int, Tensor], trunk: Tensor, size: Size
    ) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.late.LateSidePath`."""
        task = streams[self._before]
        for path, block in zip(self._paths, self.copies, strict=True):
            differences = dict(block.named_parameters())
            task = run_copy(self._trunk[0], path, block, task, differences)
        maps = [
            to_maps(F.layer_norm(x, x.shape[-1:]), size)
            for x in (task, *(streams[i] for i in self._priors))
        ]
        prior = self.prior(torch.cat(maps[1:], 1))
        fused = self.fusion(torch.cat([prior, maps[0]], 1))
        grid = fused.flatten(2).transpose(1, 2).to(trunk.dtype)
        return torch.cat([trunk[:, : -grid.shape[1]], grid], 1)
