"""ViT-Adapter's spatial prior with extractors, and no injectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec, Trunk
from e3va_mm.tuners.beside.attention import HEAD, heads_of
from e3va_mm.tuners.beside.late import require_plain, to_maps
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.replay import Replay
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class SpatialPriorOptions(SidePathOptions):
    """Options of :class:`SpatialPrior`, beside :class:`SidePathOptions`.

    Attributes:
        stem (int): Channels of the stem, doubled with each stride. Defaults
            to 64.
        width (int): Channels of the prior's tokens, at least 4.
            Defaults to 192.
    """

    stem: int = option(64, whole())
    width: int = option(192, whole(4))


class Stem(nn.Module):
    """Convolutions on the image, at strides 4, 8 and 16.

    Args:
        channels (int): At stride 4, doubled with each stride.
        width (int): Channels of the output.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.GroupNorm(1, outputs),
                nn.ReLU(),
            )

        self.first = nn.Sequential(
            conv(3, channels, 2), conv(channels, channels, 2)
        )
        self.others = nn.ModuleList(
            conv(channels * k, channels * 2 * k, 2) for k in (1, 2)
        )
        self.project = nn.ModuleList(
            nn.Conv2d(channels * k, width, 1) for k in (1, 2, 4)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> a map of ``width`` channels for each stride."""
        maps = [self.first(image)]
        for other in self.others:
            maps.append(other(maps[-1]))
        return [p(m) for p, m in zip(self.project, maps, strict=True)]


class Extractor(nn.Module):
    """Tokens of the prior attend to those of the trunk; then a filtered MLP.

    Args:
        width (int): Channels of the prior's tokens.
        channels (int): Those of the trunk's.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.heads = heads_of(width, 4 * HEAD)
        self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(2))
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(width, width)
        self.pair = nn.Linear(channels, 2 * width)
        self.proj = nn.Linear(width, width)
        self.down = nn.Linear(width, width // 4)
        self.filter = nn.Conv2d(
            width // 4, width // 4, 3, padding=1, groups=width // 4
        )
        self.expand = nn.Linear(width // 4, width)
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, prior: Tensor, trunk: Tensor, size: Size) -> Tensor:
        """(B, H * W, width), (B, L, C) -> (B, H * W, width)."""
        query = self.query(self.norm1(prior)).unflatten(2, (self.heads, -1))
        pair = self.pair(self.norm(trunk)).unflatten(2, (2, self.heads, -1))
        key, value = pair.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value
        )
        prior = prior + self.proj(mixed.transpose(1, 2).flatten(2))
        inner = self.filter(to_maps(self.down(self.norm2(prior)), size))
        return prior + self.expand(F.gelu(inner).flatten(2).transpose(1, 2))


@MODELS.register_module()
class SpatialPrior(StreamSidePath):
    """Convolutions on the image, whose tokens query a frozen ViT.

    `ViT-Adapter <https://arxiv.org/abs/2205.08534>`_ (Sec. 3.3 and 3.4) as
    `DINOv3 <https://arxiv.org/abs/2508.10104>`_ has it on a frozen trunk:
    extractors alone, at each output. It starts as the stock backbone.

    An output has the grid of the trunk here: the maps of all strides meet on
    it, where the paper gives a pyramid at strides 4 to 32 and attention is
    deformable over it.

    Args:
        **options: See :class:`SpatialPriorOptions`.

    Raises:
        ConfigError: If the trunk has stages.
    """

    OPTIONS = SpatialPriorOptions
    taps = ()

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        require_plain(self, trunk)
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'SpatialPrior':
        """Make the stem, and an extractor for each output."""
        width = self.options.width
        self.stem = Stem(self.options.stem, width)
        self.stages = nn.ModuleList(
            Extractor(width, spec.channels) for spec in stages
        )
        return self

    def start(
        self,
        stage: int,
        inherited: object | None,
        replay: Replay | None = None,
    ) -> Streams:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        if inherited is None:
            inherited = self.stem(replay.image)
        return Streams(stage, inherited)

    def output(self, highway: Streams, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        prior = highway.before
        if isinstance(prior, list):  # of the stem, one for each stride
            maps = sum(F.adaptive_avg_pool2d(each, size) for each in prior)
            prior = maps.flatten(2).transpose(1, 2)
        extractor = self.stages[highway.stage]
        highway.after = extractor(prior, trunk, size)
        added = extractor.up(highway.after)
        extra = trunk.shape[1] - added.shape[1]
        return torch.cat([trunk[:, :extra], trunk[:, extra:] + added], 1)
