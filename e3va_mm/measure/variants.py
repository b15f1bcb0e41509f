"""The variants of one config that are measured beside each other."""

import copy
from collections.abc import Collection, Mapping

from mmengine.config import Config, ConfigDict
from torch import nn

from e3va_mm.backbones.faces import vit_config as vit_trunk_config
from e3va_mm.errors import ConfigError
from e3va_mm.trunks.build import scoped_name
from e3va_mm.trunks.families import FAMILIES, VITS
from e3va_mm.tuners.e3va.presets import PRESETS
from e3va_mm.utils import mark_trainable

# Tuning inside the backbone, at the sizes of the published counts.
METHODS: Mapping[str, Mapping] = {
    'full': dict(type='e3va_mm.Full'),
    'fixed': dict(type='e3va_mm.Fixed'),
    'bitfit': dict(type='e3va_mm.BitFit'),
    'norm': dict(type='e3va_mm.NormTuning'),
    'partial1': dict(type='e3va_mm.Partial', blocks=1),
    'adapter': dict(type='e3va_mm.Adapter'),
    'lora': dict(type='e3va_mm.LoRA'),
    'adaptformer': dict(type='e3va_mm.AdaptFormer'),
    'lorand': dict(type='e3va_mm.LoRand'),
    'mona': dict(type='e3va_mm.Mona'),
}
VARIANTS = {
    'as-is': 'as the config has it',
    'full': 'the stock backbone, fine-tuned as a whole',
    'frozen': 'the stock backbone, frozen and in eval mode',
    'frozen-same': 'the trunk alone, frozen, with the trunk options of as-is',
    'frozen-lean': 'the trunk alone, frozen, with the trunk options of lean',
    'exact': 'with a side path, preset exact',
    'lean': 'with a side path, preset lean',
    'bitfit': 'the stock backbone, of which biases train',
    'norm': 'the stock backbone, of which norms train',
    'partial1': 'the stock backbone, of which the last block trains',
    'adapter': 'the stock backbone, frozen, with Adapter inside',
    'adaptformer': 'the stock backbone, frozen, with AdaptFormer inside',
    'lorand': 'the stock backbone, frozen, with LoRand inside',
    'mona': 'the stock backbone, frozen, with Mona inside',
    'lora': 'the stock backbone, frozen, with LoRA of rank 64 on q and v',
}
# These work with any backbone.
GENERIC = ('as-is', 'full', 'frozen')

SWIN = 'e3va_mm.E3VASwinTransformer'
VIT = 'e3va_mm.E3VAVisionTransformer'
ANY = 'e3va_mm.E3VABackbone'
OURS = (SWIN, VIT, ANY)
# Those with a rival method inside.
TUNED_SWIN = 'e3va_mm.PETLSwinTransformer'
TUNED = 'e3va_mm.PETLBackbone'
RIVALS = (TUNED_SWIN, TUNED)
STOCK_SWINS = ('mmdet.SwinTransformer', 'mmseg.SwinTransformer')
# Arguments of our backbones that the stock class does not know.
OWN_ARGUMENTS = ('side_path', 'method', 'allow_random_trunk', 'layout')
# Where weights come from.
WEIGHTS = ('init_cfg', 'pretrained')


def variant_config(config: Config, variant: str) -> Config:
    """The config of a variant, without any weights to download.

    The bytes and the arithmetic of a model do not depend on its weights, so
    every ``init_cfg`` is dropped. That a stock backbone is frozen is no matter
    of a config: see :func:`prepare_variant`.

    Args:
        config (Config): A detection or segmentation config.
        variant (str): A key of ``VARIANTS``.

    Returns:
        Config: A changed copy.

    Raises:
        ConfigError: If the variant is unknown, or the backbone is of no kind
            that it can be made of.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f'Variants are {", ".join(VARIANTS)}, but got {variant!r}.'
        )
    config = copy.deepcopy(config)
    if 'model' not in config:
        raise ConfigError(
            f'{config.filename}: expected a config with a model, but it has '
            f'the keys {", ".join(config)}.'
        )
    _drop_weights(config.model)
    if variant == 'as-is':
        return config
    backbone = config.model.get('backbone')
    if backbone is None:
        raise ConfigError(
            f'The variant {variant} needs a model with a `backbone`, but '
            f'{config.model.type} has the keys {", ".join(config.model)}. '
            'Measure it as-is.'
        )
    kind = type_name(config, backbone)
    if not _is_known(kind) and variant not in GENERIC:
        raise ConfigError(
            f'The variant {variant} needs model.backbone.type to be one of '
            f'{", ".join(OURS)} or a stock backbone of their families, but '
            f'got {kind!r}. Other backbones have the variants '
            f'{", ".join(GENERIC)}.'
        )
    if variant in ('full', 'frozen'):
        config.model.backbone = stock_backbone(
            backbone, kind, framework(config)
        )
    elif variant in METHODS:
        config.model.backbone = rival_backbone(config, variant)
        config.model.backbone.allow_random_trunk = True
    else:
        backbone = own_backbone(backbone, kind)
        backbone.allow_random_trunk = True
        backbone.side_path = side_path_of(variant, backbone.get('side_path'))
        config.model.backbone = backbone
    return config


def prepare_variant(model: nn.Module, variant: str) -> None:
    """Freeze a built model's backbone where a variant has it frozen.

    Args:
        model (nn.Module): Of :func:`variant_config`, in training mode.
        variant (str): A key of ``VARIANTS``.
    """
    if variant == 'frozen':
        mark_trainable(model.backbone, [])
        model.backbone.eval()


def framework(config: Config) -> str:
    """The scope of a config's model; new-style configs have a class there."""
    name = _class_name(config.model.get('type', ''))
    return name.split('.')[0] if '.' in name else config.get('default_scope')


def _drop_weights(node) -> None:
    """Remove what would load weights, at any depth, and do without."""
    if isinstance(node, Mapping):
        for key in WEIGHTS:
            node.pop(key, None)
        if _class_name(node.get('type', '')) in (*OURS, *RIVALS):
            node['allow_random_trunk'] = True
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            _drop_weights(value)


def type_name(config: Config, backbone: Mapping) -> str:
    """Scope and name of a class, given as a string or as the class."""
    name = _class_name(backbone.get('type', ''))
    return name if '.' in name else f'{framework(config)}.{name}'


def _class_name(kind: str | type) -> str:
    """A registered name as it stands; that of a class with its scope."""
    return scoped_name(kind) if callable(kind) else str(kind)


def _is_known(kind: str) -> bool:
    """Whether a backbone is ours, or a stock one that can become ours."""
    timm = kind.endswith('.TIMMBackbone')
    known = (*OURS, *RIVALS, *STOCK_SWINS, *FAMILIES)
    return kind in known or timm


def stock_backbone(backbone: ConfigDict, kind: str, scope: str) -> ConfigDict:
    """The stock backbone, of which everything trains."""
    own = {key: v for key, v in backbone.items() if key not in OWN_ARGUMENTS}
    if kind in (SWIN, TUNED_SWIN):
        own['type'] = f'{scope}.SwinTransformer'
        if scope != 'mmdet':
            own.pop('convert_weights', None)
    elif kind == VIT:
        del own['type']
        own = vit_trunk_config(own, scope)
    elif kind in (ANY, TUNED):
        own = dict(backbone.trunk)
    else:
        own = dict(backbone)
    if 'frozen_stages' in own:
        own['frozen_stages'] = -1
    return ConfigDict(own)


def own_backbone(backbone: ConfigDict, kind: str) -> ConfigDict:
    """The backbone as ours, whichever it is."""
    if kind in OURS:
        return backbone
    if kind == TUNED_SWIN:
        own = {k: v for k, v in backbone.items() if k != 'method'}
        return ConfigDict(own, type=SWIN)
    outside = {}
    if kind == TUNED:
        outside = _outside(backbone, ())
        kind, backbone = backbone.trunk.type, backbone.trunk
    flat = {**backbone, **outside}
    flat.pop('layout', None)
    if kind in STOCK_SWINS:
        return ConfigDict(flat, type=SWIN)
    if kind in VITS:
        return ConfigDict(flat, type=VIT, trunk_type=kind)
    return ConfigDict(type=ANY, trunk=dict(backbone, type=kind), **outside)


def _outside(backbone: ConfigDict, inside: Collection[str]) -> dict:
    """What stands outside the trunk in our backbones, unless it is inside."""
    return {
        key: backbone[key]
        for key in ('layout', 'allow_random_trunk', *WEIGHTS)
        if key in backbone and key not in inside
    }


def rival_backbone(config: Config, method: str) -> ConfigDict:
    """The stock backbone of a config with a tuning method inside.

    Args:
        config (Config): A detection or segmentation config.
        method (str): A key of ``METHODS``.
    """
    backbone = config.model.backbone
    kind = type_name(config, backbone)
    stock = stock_backbone(backbone, kind, framework(config))
    outside = _outside(backbone, stock)
    outside['method'] = dict(METHODS[method])
    if type_name(config, stock) in STOCK_SWINS:
        outside.pop('layout', None)
        return ConfigDict(stock, type=TUNED_SWIN, **outside)
    return ConfigDict(type=TUNED, trunk=stock, **outside)


def side_path_of(variant: str, given: Mapping | None) -> dict:
    """The side path of a variant, from that of the config."""
    given = dict(given or {})
    trunk = {
        key: value
        for key, value in given.items()
        if key == 'preset' or key.startswith('trunk_')
    }
    if variant == 'frozen-lean':
        trunk = dict(preset='lean')
    if variant.startswith('frozen'):
        nothing = dict(type='e3va_mm.NoSidePath', train_output_norms=False)
        return {**nothing, **trunk}
    # The preset decides on all that it may set.
    decided = set(trunk).union(*PRESETS.values())
    own = {k: v for k, v in given.items() if k not in decided}
    return dict(own, preset=variant)
