"""Swin Transformer with a side path, over the stock class."""

import importlib.util
from collections.abc import Mapping, Sequence

from e3va_mm.backbones.presets import resolve_side_path
from e3va_mm.backbones.side_path_backbone import SidePathBackbone
from e3va_mm.backbones.stock_arguments import (
    build_stock,
    current_scope,
    init_cfg_of,
    say_without_effect,
)
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import SwinTrunk
from e3va_mm.utils import is_number, is_whole


@MODELS.register_module()
class E3VASwinTransformer(SidePathBackbone):
    """Frozen stock Swin Transformer with an E3VA side path.

    `Parameter-efficient is not sufficient
    <https://arxiv.org/abs/2306.09729>`_. A stock config becomes an E3VA config
    by ``type='e3va_mm.E3VASwinTransformer'``; its other arguments stay. The
    stock class is mmdet's or mmseg's: that of the default scope, or whichever
    is installed.

    Args:
        side_path (Mapping, optional): What trains: ``type`` and arguments of
            the side path (those of :class:`~e3va_mm.models.E3VASidePath`,
            such as ``rank`` and ``save_taps``), and

            * ``preset`` (str): ``'exact'``, which changes no number of the
              method, or ``'lean'``, which keeps taps in 4 bits, those of
              the first stage not at all, computes in bfloat16 and stores the
              trunk in it; default ``'exact'``.
            * ``train_output_norms`` (bool): Train ``norm0``...; default True.
            * ``trunk_compute``, ``trunk_weights``, ``trunk_chunk``,
              ``trunk_compile``, ``trunk_drop_path``: How the trunk computes,
              see :class:`~e3va_mm.trunks.TrunkOptions`.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        out_indices (Sequence[int]): Any subset of the stages. Nothing is
            built past the last. Defaults to (0, 1, 2, 3).
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``: an official Swin file, an MM-format backbone or
            a whole detector, .pth or .safetensors. Every trunk weight must
            arrive.
        pretrained (str, optional): Deprecated form of ``init_cfg``.
        convert_weights (bool): Accepted; the format is recognised.
        drop_rate, attn_drop_rate, drop_path_rate (float): Accepted without
            effect: the trunk is frozen and deterministic, see
            ``trunk_drop_path``.
        frozen_stages (int), with_cp (bool): Accepted without effect: the whole
            trunk is frozen and keeps nothing for a backward pass.

    The remaining arguments are those of the stock class.

    Raises:
        ConfigError: If an argument is out of range, or neither mmdet nor
            mmsegmentation is installed.
    """

    def __init__(
        self,
        pretrain_img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        embed_dims: int = 96,
        patch_size: int = 4,
        window_size: int = 7,
        mlp_ratio: float = 4,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        strides: Sequence[int] = (4, 2, 2, 2),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_abs_pos_embed: bool = False,
        act_cfg: Mapping = dict(type='GELU'),
        norm_cfg: Mapping = dict(type='LN'),
        with_cp: bool = False,
        pretrained: str | None = None,
        convert_weights: bool = False,
        frozen_stages: int = -1,
        init_cfg: Mapping | None = None,
        side_path: Mapping | None = None,
        allow_random_trunk: bool = False,
    ) -> None:
        say_without_effect(
            type(self).__name__,
            dict(
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate,
                with_cp=with_cp,
                frozen_stages=frozen_stages,
            ),
        )
        init_cfg = init_cfg_of(init_cfg, pretrained)
        _check_stages(depths=depths, num_heads=num_heads, strides=strides)
        out_indices = _checked_out_indices(out_indices, len(depths))
        if not (qk_scale is None or is_number(qk_scale)):
            raise ConfigError(
                '`backbone.qk_scale` should be a number or None, but got '
                f'{qk_scale!r}.'
            )
        side_path, options = resolve_side_path(side_path)

        if isinstance(pretrain_img_size, list):
            pretrain_img_size = tuple(pretrain_img_size)
        stock = build_stock(
            f'{swin_scope()}.SwinTransformer',
            dict(
                pretrain_img_size=pretrain_img_size,
                in_channels=in_channels,
                embed_dims=embed_dims,
                patch_size=patch_size,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                depths=depths,
                num_heads=num_heads,
                strides=strides,
                out_indices=out_indices,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                patch_norm=patch_norm,
                use_abs_pos_embed=use_abs_pos_embed,
                act_cfg=act_cfg,
                norm_cfg=norm_cfg,
            ),
            options.drop_path,
        )
        last = out_indices[-1]
        del stock.stages[last + 1 :]
        stock.stages[last].downsample = None

        super().__init__(
            SwinTrunk(options),
            stock,
            out_indices,
            side_path=side_path,
            allow_random_trunk=allow_random_trunk,
            init_cfg=init_cfg,
        )
        # As the stock class has them; `SwinTrunk` reads the last two.
        self.out_indices = out_indices
        self.use_abs_pos_embed = use_abs_pos_embed
        self.num_features = stock.num_features


def _checked_out_indices(
    out_indices: Sequence[int], depth: int
) -> tuple[int, ...]:
    """Outputs in ascending order, as the stock class gives them."""
    if (
        not isinstance(out_indices, (list, tuple, range))
        or not out_indices
        or not all(is_whole(index, 0, depth - 1) for index in out_indices)
    ):
        raise ConfigError(
            '`backbone.out_indices` should name at least one of the stages '
            f'{tuple(range(depth))}, but got {out_indices!r}.'
        )
    return tuple(sorted(set(out_indices)))


def _check_stages(**options: Sequence[int]) -> None:
    """Refuse options by stage that the stock class would count through."""
    for name, value in options.items():
        if not (
            isinstance(value, (list, tuple))
            and value
            and all(is_whole(each, 1, 2**16) for each in value)
        ):
            raise ConfigError(
                f'`backbone.{name}` should hold a whole number above zero for '
                f'each stage, but got {value!r}.'
            )
    if len(set(map(len, options.values()))) > 1:
        raise ConfigError(
            f'{", ".join(f"`backbone.{name}`" for name in options)} should '
            'be of one length, that of the stages, but are '
            f'{", ".join(map(str, options.values()))}.'
        )


def swin_scope() -> str:
    """The framework to take the stock class from."""
    preferred = current_scope()
    for name in sorted(('mmdet', 'mmseg'), key=lambda n: n != preferred):
        if importlib.util.find_spec(name):
            return name
    raise ConfigError(
        'The stock Swin Transformer comes from MMDetection or '
        'MMSegmentation, but neither is installed. Install one: `pip install '
        'onedl-mmdetection` or `pip install onedl-mmsegmentation`.'
    )
