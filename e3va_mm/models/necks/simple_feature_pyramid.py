"""Maps of several strides from a trunk that has one.

`Exploring Plain Vision Transformer Backbones for Object Detection
<https://arxiv.org/abs/2203.16527>`_ (ViTDet), Sec. 3.
"""

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet, in the place of an FPN.

    Each scale of the last map, made by transposed convolutions or pooling, is
    brought to ``out_channels`` by a 1x1 and a 3x3 convolution with a norm
    each. For an FPN behind it, put both into a list: ``neck=[dict(type=
    'e3va_mm.SimpleFeaturePyramid', ...), dict(type='FPN', ...)]``.

    Args:
        in_channels (int): Channels ``C`` of the maps.
        out_channels (int): Channels of the outputs. Defaults to 256.
        scales (Sequence[float]): Sizes of the outputs relative to the maps:
            4, 2, 1 or 0.5, the largest first. With patches of 16 pixels the
            default (4, 2, 1, 0.5) gives the strides 4, 8, 16 and 32.
        num_outs (int, optional): Outputs in all; those beyond ``scales`` are
            every other pixel of the one before. Defaults to that of
            ``scales``.
        init_cfg (dict, optional): As for every module of mmengine.

    Raises:
        ConfigError: If ``scales`` or ``num_outs`` cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        wrong = [scale for scale in scales if scale not in (4, 2, 1, 0.5)]
        if wrong or not scales:
            raise ConfigError(
                '`neck.scales` should hold some of (4, 2, 1, 0.5), but got '
                f'{tuple(scales)}.'
            )
        self.num_outs = len(scales) if num_outs is None else num_outs
        if self.num_outs < len(scales):
            raise ConfigError(
                f'`neck.num_outs` should be at least the {len(scales)} of '
                f'`neck.scales`, but got {num_outs}.'
            )
        self.resamplings = nn.ModuleList()
        self.convs = nn.ModuleList()
        for scale in scales:
            resampling, channels = _resampling(scale, in_channels)
            self.resamplings.append(resampling)
            self.convs.append(
                nn.Sequential(
                    nn.Conv2d(channels, out_channels, 1, bias=False),
                    MapNorm(out_channels),
                    nn.Conv2d(
                        out_channels, out_channels, 3, padding=1, bias=False
                    ),
                    MapNorm(out_channels),
                )
            )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W) -> ``num_outs`` maps (B, out_channels, H', W').

        With as many maps as scales each is made from its own, else all from
        the last.
        """
        if len(inputs) != len(self.convs):
            inputs = [inputs[-1]] * len(self.convs)
        outputs = [
            # RoIAlign of mmcv reads memory in the order of a contiguous map.
            conv(resample(maps)).contiguous()
            for resample, conv, maps in zip(
                self.resamplings, self.convs, inputs, strict=True
            )
        ]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, 2))
        return tuple(outputs)


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resampling(scale: float, channels: int) -> tuple[nn.Module, int]:
    """What brings a map to ``scale`` times its size, and its channels."""
    if scale == 4:
        half, quarter = channels // 2, channels // 4
        layers = [
            nn.ConvTranspose2d(channels, half, 2, 2),
            MapNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        ]
        return nn.Sequential(*layers), quarter
    if scale == 2:
        return nn.ConvTranspose2d(channels, channels // 2, 2, 2), channels // 2
    if scale == 1:
        return nn.Identity(), channels
    return nn.MaxPool2d(2, 2), channels
