"""Maps of several strides from a trunk that has one.

`Exploring Plain Vision Transformer Backbones for Object Detection
<https://arxiv.org/abs/2203.16527>`_ (ViTDet), Sec. 3.
"""

from collections.abc import Mapping, Sequence

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.utils import is_whole

MOST_CHANNELS = 2**16
MOST_OUTS = 16


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet, in the place of an FPN.

    Each scale of the last map, made by transposed convolutions or pooling, is
    brought to ``out_channels`` by a 1x1 and a 3x3 convolution with a norm
    each. For an FPN behind it, put both into a list: ``neck=[dict(type=
    'e3va_mm.SimpleFeaturePyramid', ...), dict(type='FPN', ...)]``.

    Args:
        in_channels (int): Channels ``C`` of the maps, at least 4.
        out_channels (int): Channels of the outputs. Defaults to 256.
        scales (Sequence[float]): Sizes of the outputs relative to the maps:
            4, 2, 1 or 0.5, the largest first. With patches of 16 pixels the
            default (4, 2, 1, 0.5) gives the strides 4, 8, 16 and 32.
        num_outs (int, optional): Outputs in all, at most 16; those beyond
            ``scales`` are every other pixel of the one before. Defaults to
            that of ``scales``.
        init_cfg (dict, optional): As for every module of mmengine.

    Raises:
        ConfigError: If an argument cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(_checked_init_cfg(init_cfg))
        for name, value, least in (
            ('in_channels', in_channels, 4),
            ('out_channels', out_channels, 1),
        ):
            if not is_whole(value, least, MOST_CHANNELS):
                raise ConfigError(
                    f'`neck.{name}` should be a whole number from {least} to '
                    f'{MOST_CHANNELS}, but got {value!r}.'
                )
        allowed = (4, 2, 1, 0.5)
        if (
            not isinstance(scales, (list, tuple))
            or not scales
            or any(scale not in allowed for scale in scales)
        ):
            raise ConfigError(
                f'`neck.scales` should hold some of {allowed}, but got '
                f'{scales!r}.'
            )
        self.num_outs = len(scales) if num_outs is None else num_outs
        if not is_whole(self.num_outs, len(scales), MOST_OUTS):
            raise ConfigError(
                f'`neck.num_outs` should be at least the {len(scales)} of '
                f'`neck.scales` and at most {MOST_OUTS}, but got '
                f'{num_outs!r}.'
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


def _checked_init_cfg(
    init_cfg: dict | list[dict] | None,
) -> dict | list[dict] | None:
    given = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    for each in given:
        if init_cfg is not None and not (
            isinstance(each, Mapping) and isinstance(each.get('type'), str)
        ):
            raise ConfigError(
                '`neck.init_cfg` should be a dict with a `type`, or a list of '
                f'such, but got {init_cfg!r}.'
            )
    return init_cfg


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
