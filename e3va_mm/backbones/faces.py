"""The names of tuned backbones in configs, with the stock arguments.

All build a :class:`~e3va_mm.backbones.tuned.TunedBackbone` and take any
tuner; they differ in how the stock backbone is named.
"""

import importlib.util
from collections.abc import Mapping

from e3va_mm.backbones.stock import (
    build_stock,
    current_scope,
    find_class,
    init_cfg_of,
    split_config,
)
from e3va_mm.backbones.tuned import TunedBackbone, tune
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Layout, TrunkOptions, build_trunk
from e3va_mm.trunks.build import scoped_name
from e3va_mm.trunks.families import SWINS, VITS
from e3va_mm.tuners.base import Tuner
from e3va_mm.tuners.e3va.presets import resolve_preset

# Keys of a backbone's config that name its tuner, two of them of old.
TUNER_KEYS = ('tuner', 'side_path', 'method')
SWIN = 'e3va_mm.E3VASwinTransformer'
VIT = 'e3va_mm.E3VAVisionTransformer'
ANY = 'e3va_mm.E3VABackbone'
# Other names -> what they stand for.
NAMES = {
    SWIN: SWIN,
    VIT: VIT,
    ANY: ANY,
    'e3va_mm.PETLSwinTransformer': SWIN,
    'e3va_mm.PETLBackbone': ANY,
}


@MODELS.register_module(name=['E3VABackbone', 'PETLBackbone'])
def E3VABackbone(
    trunk: Mapping,
    tuner: Mapping | None = None,
    layout: Mapping | None = None,
    allow_random_trunk: bool = False,
    init_cfg: Mapping | None = None,
    *,
    side_path: Mapping | None = None,
    method: Mapping | None = None,
    trunk_cache: Mapping | None = None,
) -> TunedBackbone:
    """A stock backbone of any family with a tuner.

    Args:
        trunk (Mapping): Config of the stock backbone, such as
            ``dict(type='mmpretrain.SwinTransformerV2', arch='base')``, with
            its ``out_indices``. Its ``init_cfg`` may be here or outside.
        tuner (Mapping, optional): What trains: ``type``, by default
            ``'E3VA'``, and the options of that tuner
            (:mod:`e3va_mm.tuners`). Of those beside a frozen trunk also

            * ``preset`` (str): ``'exact'``, which changes no number of the
              method, or ``'lean'``, which keeps taps in 4 bits, those of
              the first stage not at all (on a plain trunk all in 8 bits),
              computes in bfloat16 and stores the trunk in it; default
              ``'exact'``. Options beside it come first.
            * ``trunk_compute``, ``trunk_weights``, ``trunk_chunk``,
              ``trunk_compile``, ``trunk_drop_path``: How the trunk computes,
              see :class:`~e3va_mm.trunks.TrunkOptions`.
        layout (Mapping, optional): Where its blocks, taps and outputs are:
            the fields of :class:`~e3va_mm.trunks.Layout`. Needed for a family
            that is not in the table of :mod:`e3va_mm.trunks.families`.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``, .pth or .safetensors, a path or a URL. Every
            trunk weight must arrive.
        side_path (Mapping, optional): An older name of ``tuner``.
        method (Mapping, optional): Another one.
        trunk_cache (Mapping, optional): Keep on disk what the frozen trunk
            gives, see
            :class:`~e3va_mm.backbones.trunk_cache.TrunkCacheOptions`.

    Raises:
        ConfigError: If the trunk is of no known family and there is no
            ``layout``, or an argument is unknown or out of range.
    """
    kind, stock, init_cfg = split_config(trunk, init_cfg)
    return _build(
        kind,
        stock,
        _one_of(tuner, side_path, method),
        layout,
        allow_random_trunk,
        init_cfg,
        trunk_cache,
    )


@MODELS.register_module(name=['E3VASwinTransformer', 'PETLSwinTransformer'])
def E3VASwinTransformer(
    tuner: Mapping | None = None,
    allow_random_trunk: bool = False,
    init_cfg: Mapping | None = None,
    pretrained: str | None = None,
    convert_weights: bool = False,
    *,
    side_path: Mapping | None = None,
    method: Mapping | None = None,
    trunk_cache: Mapping | None = None,
    **stock,
) -> TunedBackbone:
    """A stock Swin Transformer with a tuner.

    A stock config becomes one by ``type='e3va_mm.E3VASwinTransformer'``; its
    other arguments stay. The stock class is mmdet's or mmseg's: that of the
    default scope, or whichever is installed.

    Over a trunk without a graph ``drop_path_rate``, ``drop_rate``,
    ``attn_drop_rate`` and ``with_cp`` are accepted without effect, see
    ``trunk_drop_path``; ``frozen_stages`` never has one. ``out_indices`` names
    any subset of the stages; nothing is built past the last.

    Args:
        tuner (Mapping, optional): See :func:`E3VABackbone`.
        allow_random_trunk (bool): See :func:`E3VABackbone`.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``: an official Swin file, an MM-format backbone or
            a whole detector, .pth or .safetensors.
        pretrained (str, optional): Deprecated form of ``init_cfg``.
        convert_weights (bool): Accepted; the format is recognised.
        side_path (Mapping, optional): An older name of ``tuner``.
        method (Mapping, optional): Another one.
        trunk_cache (Mapping, optional): See :func:`E3VABackbone`.
        **stock: The arguments of the stock class.

    Raises:
        ConfigError: If an argument is out of range, or neither mmdet nor
            mmsegmentation is installed.
    """
    return _build(
        f'{swin_scope()}.SwinTransformer',
        stock,
        _one_of(tuner, side_path, method),
        None,
        allow_random_trunk,
        init_cfg_of(init_cfg, pretrained),
        trunk_cache,
    )


@MODELS.register_module()
def E3VAVisionTransformer(
    trunk_type: str | None = None,
    tuner: Mapping | None = None,
    allow_random_trunk: bool = False,
    init_cfg: Mapping | None = None,
    pretrained: str | None = None,
    *,
    side_path: Mapping | None = None,
    method: Mapping | None = None,
    trunk_cache: Mapping | None = None,
    **stock,
) -> TunedBackbone:
    """A stock plain ViT with a tuner.

    A stock config becomes one by ``type='e3va_mm.E3VAVisionTransformer'``; its
    other arguments stay.

    A plain ViT has one resolution: adapters read both branches of every block
    up to the last output, and the highway goes on from one output to the next
    without a downsampling. Outputs are maps (B, C, H, W), as many as
    ``out_indices``, all of one size; what UperNet's necks of mmsegmentation
    expect. For FPN-type necks see
    :class:`~e3va_mm.necks.SimpleFeaturePyramid`.

    The final norm of the stock class trains, where the last block is an
    output; class token, registers, position embeddings and layer scales are
    the trunk's and stay.

    Args:
        trunk_type (str, optional): The stock class: of mmpretrain
            ``'mmpretrain.VisionTransformer'`` (DeiT, MAE, CLIP, DINOv2),
            ``'mmpretrain.BEiTViT'``, ``'mmpretrain.ViTEVA02'`` or
            ``'mmpretrain.ViTSAM'``; of mmsegmentation
            ``'mmseg.VisionTransformer'``, ``'mmseg.BEiT'`` or ``'mmseg.MAE'``.
            Defaults to the ``VisionTransformer`` of mmsegmentation where its
            tools run, else to that of mmpretrain.
        tuner (Mapping, optional): See :func:`E3VABackbone`. ``save_taps`` may
            name one mode for each output instead of each stage.
        allow_random_trunk (bool): See :func:`E3VABackbone`.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``: a file of the stock class, or an official one
            of DINOv2, MAE, SAM, BEiT or timm.
        pretrained (str, optional): Deprecated form of ``init_cfg``.
        side_path (Mapping, optional): An older name of ``tuner``.
        method (Mapping, optional): Another one.
        trunk_cache (Mapping, optional): See :func:`E3VABackbone`.
        **stock: The arguments of the stock class. ``out_type`` of mmpretrain's
            is ``'featmap'`` by default, but for mmpretrain's own tools.

    Raises:
        ConfigError: If an argument is unknown or out of range, or the stock
            class is not there.
    """
    if trunk_type is not None:
        stock['trunk_type'] = trunk_type
    stock = vit_config(stock, current_scope())
    return _build(
        stock.pop('type'),
        stock,
        _one_of(tuner, side_path, method),
        None,
        allow_random_trunk,
        init_cfg_of(init_cfg, pretrained),
        trunk_cache,
    )


def _build(
    kind: type | str,
    stock: Mapping,
    tuner: Mapping,
    layout: Mapping | None,
    allow_random_trunk: bool,
    init_cfg: Mapping | None,
    trunk_cache: Mapping | None,
) -> TunedBackbone:
    """A stock backbone that a tuner has joined."""
    tuner = dict(tuner)
    tuner_class = find_tuner(tuner.pop('type', 'E3VA'))
    layout = None if layout is None else Layout.of(layout)
    if tuner_class.HAS_GRAPH:
        built = build_stock(kind, stock)
        trunk = build_trunk(built, TrunkOptions(), layout)
    else:
        _, options = resolve_preset(tuner)
        built = build_stock(kind, stock, options.drop_path)
        trunk = build_trunk(built, options, layout)
        tuner, _ = resolve_preset(tuner, trunk.layout.plain)
    return tune(
        built,
        trunk,
        tuner_class(**tuner),
        allow_random_trunk=allow_random_trunk,
        init_cfg=init_cfg,
        trunk_cache=trunk_cache,
    )


def _one_of(*configs: Mapping | None) -> Mapping:
    """The config of the tuner, by whichever name it is there."""
    named = {
        name: config
        for name, config in zip(TUNER_KEYS, configs, strict=True)
        if config is not None
    }
    if len(named) > 1:
        raise ConfigError(
            f'{" and ".join(f"`backbone.{name}`" for name in named)} both '
            'name what trains. Keep `tuner`.'
        )
    for name, config in named.items():
        if not isinstance(config, Mapping):
            raise ConfigError(
                f'`backbone.{name}` should be a dict, such as '
                f"dict(type='E3VA', rank=16), but got {config!r}."
            )
        return config
    return {}


def find_tuner(kind: object) -> type[Tuner]:
    """The class of a tuner that a config means.

    Raises:
        ConfigError: If it means none.
    """
    found = find_class(kind)
    if not (isinstance(found, type) and issubclass(found, Tuner)):
        raise ConfigError(
            "`tuner.type` should be the name of a tuner, such as 'E3VA' or "
            f"'LoRA', but got {kind!r}."
        )
    return found


def swin_scope() -> str:
    """The framework to take the stock Swin Transformer from."""
    preferred = current_scope()
    for name in sorted(('mmdet', 'mmseg'), key=lambda n: n != preferred):
        if importlib.util.find_spec(name):
            return name
    raise ConfigError(
        'The stock Swin Transformer comes from MMDetection or '
        'MMSegmentation, but neither is installed. Install one: `pip install '
        'onedl-mmdetection` or `pip install onedl-mmsegmentation`.'
    )


def vit_config(arguments: Mapping, scope: str | None) -> dict:
    """The stock backbone that :func:`E3VAVisionTransformer` takes.

    Args:
        arguments (Mapping): Maybe ``trunk_type``, and those of the stock
            class.
        scope (str, optional): The framework whose tools run.
    """
    stock = dict(arguments)
    owner = 'mmseg' if scope == 'mmseg' else 'mmpretrain'
    kind = stock.pop('trunk_type', None) or f'{owner}.VisionTransformer'
    if isinstance(kind, type):  # in configs of the new style
        kind = scoped_name(kind)
    if not isinstance(kind, str):
        raise ConfigError(
            '`trunk_type` should be the name of a stock class, such as '
            f"'mmpretrain.VisionTransformer', but got {kind!r}."
        )
    if kind.startswith('mmpretrain.') and scope != 'mmpretrain':
        stock.setdefault('out_type', 'featmap')
    return dict(stock, type=kind)


def tuned_config(
    backbone: Mapping, scope: str, tuner: Mapping | None = None
) -> dict:
    """The config of a backbone as one of ours, whichever it is.

    Args:
        backbone (Mapping): Config of a stock backbone, or of one of ours.
        scope (str): The framework of its model.
        tuner (Mapping, optional): Its tuner from now on. Defaults to that of
            ``backbone``, else E3VA.

    Returns:
        dict: A config with the key ``tuner``, without its older names.
    """
    own = dict(backbone)
    kind = own.pop('type')
    kind = scoped_name(kind) if callable(kind) else str(kind)
    if '.' not in kind:
        kind = f'{scope}.{kind}'
    before = [own.pop(key, None) for key in TUNER_KEYS]
    tuner = dict(_one_of(*before) if tuner is None else tuner)
    tuner.setdefault('type', 'E3VA')
    if kind in NAMES:
        return dict(own, type=NAMES[kind], tuner=tuner)
    if kind in SWINS:
        return dict(own, type=SWIN, tuner=tuner)
    if kind in VITS:
        return dict(own, type=VIT, trunk_type=kind, tuner=tuner)
    return dict(type=ANY, trunk=dict(own, type=kind), tuner=tuner)
