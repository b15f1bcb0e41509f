"""ViT-Split: trained copies of the last blocks, and a prior of frozen ones."""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, Trunk
from e3va_mm.tuners.beside.late import LateSidePath, to_maps
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
        copies = body[-count:]
        takes = inspect.signature(type(copies[0][1]).forward).parameters
        maps, weights = trunk.layout.channels_last, trunk.options.weights
        if len(takes) > 2 or maps or weights == 'int8':
            raise ConfigError(
                'ViTSplit expects blocks that take tokens alone, in floating '
                f'point, but those of {trunk.stock_class.__name__} take '
                f'{"maps" if maps else ", ".join([*takes][1:])}, in '
                f'{weights or "their own type"}. Take another trunk or tuner, '
                'or leave out `trunk_weights`.'
            )
        # In a list, or the trunk would be asked for by state dicts.
        self._trunk, self._paths = [trunk], [path for path, _ in copies]
        self.copies = nn.ModuleList(copy.deepcopy(b) for _, b in copies)
        self.copies.float()  # `trunk_weights` may store the trunk's in 16 bits
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
            stock = dict(
                self._trunk[0].stock.get_submodule(path).named_parameters()
            )
            weights = {
                name: stock[name].detach() + difference
                for name, difference in block.named_parameters()
            }
            task = functional_call(block, weights, task)
        maps = [
            to_maps(F.layer_norm(x, x.shape[-1:]), size)
            for x in (task, *(streams[i] for i in self._priors))
        ]
        prior = self.prior(torch.cat(maps[1:], 1))
        fused = self.fusion(torch.cat([prior, maps[0]], 1))
        grid = fused.flatten(2).transpose(1, 2).to(trunk.dtype)
        return torch.cat([trunk[:, : -grid.shape[1]], grid], 1)
