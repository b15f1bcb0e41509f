"""The variants of one config that are measured beside each other."""

import ast
import copy
from collections.abc import Mapping

from mmengine.config import Config, ConfigDict
from torch import nn

from e3va_mm.backbones import tuned_config
from e3va_mm.backbones.faces import NAMES, find_tuner
from e3va_mm.errors import ConfigError
from e3va_mm.trunks.build import scoped_name
from e3va_mm.tuners.e3va.presets import PRESETS, resolve_preset
from e3va_mm.utils import mark_trainable

# Tuners of a trunk with a graph, at the sizes of the published counts.
TUNERS: Mapping[str, Mapping] = {
    'full': dict(type='Full'),
    'frozen': dict(type='Frozen'),
    'bitfit': dict(type='BitFit'),
    'norm': dict(type='NormTuning'),
    'partial1': dict(type='Partial', blocks=1),
    'adapter': dict(type='Adapter'),
    'adaptformer': dict(type='AdaptFormer'),
    'lorand': dict(type='LoRand'),
    'mona': dict(type='Mona'),
    'lora': dict(type='LoRA'),
}
# Tuners beside one.
SIDE_PATHS: dict[str, Mapping] = {
    'e3va': dict(type='E3VA'),
    'e3va-mix': dict(type='E3VAMix'),
    'e3va-fusion': dict(type='E3VAFusion'),
    'adatad': dict(type='AdaTAD'),
    'dtl': dict(type='DTL'),
    'losa': dict(type='LoSA'),
    'lst': dict(type='LST'),
    'r2-tuning': dict(type='R2Tuning'),
    'res-tuning': dict(type='ResTuning'),
    'pmt': dict(type='PMT'),
    'spatial-prior': dict(type='SpatialPrior'),
    'vit-split': dict(type='ViTSplit'),
}
# Of these, such as need a trunk with one resolution.
ON_PLAIN = ('pmt', 'spatial-prior', 'vit-split')
VARIANTS = {
    'as-is': 'as the config has it',
    'full': 'the backbone fine-tuned as a whole',
    'frozen': 'the backbone frozen and in eval mode',
    'frozen-same': 'the trunk alone, frozen, with the trunk options of as-is',
    'frozen-lean': 'the trunk alone, frozen, with the trunk options of lean',
    'exact': 'with a side path, preset exact',
    'lean': 'with a side path, preset lean',
}
VARIANTS |= {
    name: f'with the tuner {tuner["type"]}'
    for name, tuner in {**TUNERS, **SIDE_PATHS}.items()
    if name not in VARIANTS
}


def variant_config(config: Config, variant: str) -> Config:
    """The config of a variant, without any weights to download.

    The bytes and the arithmetic of a model do not depend on its weights, so
    every ``init_cfg`` is dropped. A stock backbone stays one as ``full`` and
    ``frozen``, see :func:`prepare_variant`; else it becomes one of ours.

    Args:
        config (Config): A detection or segmentation config.
        variant (str): A key of ``VARIANTS``, maybe with options of its tuner,
            see :func:`named_tuner`.

    Returns:
        Config: A changed copy.

    Raises:
        ConfigError: If the variant is unknown, or there is no backbone.
    """
    if kind_of(variant) not in VARIANTS:
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
    if variant in ('full', 'frozen') and not _is_ours(backbone):
        if 'frozen_stages' in backbone:
            backbone.frozen_stages = -1
        return config
    scope = framework(config)
    ours = tuned_config(backbone, scope)
    ours.pop('trunk_cache', None)  # it is closed here, and not for all
    tuner = named_tuner(variant, ours['tuner'])
    ours = dict(ours, tuner=tuner, allow_random_trunk=True)
    config.model.backbone = ConfigDict(ours)
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
    scope, _, name = _full_name(config.model).rpartition('.')
    return scope.split('.')[0] if scope else config.get('default_scope')


def kind_of(name: str) -> str:
    """``'mona'`` of ``'mona:last=4'``."""
    return name.partition(':')[0]


def named_tuner(
    name: str, before: Mapping, tuners: Mapping[str, Mapping] = TUNERS
) -> dict:
    """The config of the tuner that a name means.

    Args:
        name (str): A key of ``tuners`` or ``SIDE_PATHS``, or what
            :func:`side_path_of` takes; any of its options may follow, as in
            ``'mona:last=4:bottleneck=32'``.
        before (Mapping): The tuner of the config.
        tuners (Mapping): Those inside a trunk, by names. Defaults to
            ``TUNERS``.

    Raises:
        ConfigError: If an option is malformed, unknown or out of range.
    """
    kind, *pairs = name.split(':')
    if kind in tuners:
        tuner = dict(tuners[kind])
    elif kind in SIDE_PATHS:
        tuner = SIDE_PATHS[kind]
        own = _undecided(_shared(before, tuner))
        tuner = {**own, **tuner, 'preset': 'exact'}
    else:
        tuner = side_path_of(kind, before)
    if not pairs:
        return tuner
    for pair in pairs:
        key, _, value = pair.partition('=')
        if not (key and value):
            raise ConfigError(
                f'Options of a tuner should follow its name as in '
                f'{kind}:OPTION=VALUE, but got {pair!r} in {name!r}.'
            )
        try:
            tuner[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            tuner[key] = value
    own = dict(tuner)
    tuner_class = find_tuner(own.pop('type'))
    if not tuner_class.HAS_GRAPH:
        own, _ = resolve_preset(own)
    tuner_class.OPTIONS.of(own)
    return tuner


def _shared(before: Mapping, tuner: Mapping) -> dict:
    """The options of a tuner that hold for one of another kind, too."""
    one, other = _class_of(before), _class_of(tuner)
    if one is other:
        return dict(before)
    if not (_is_e3va(one) and _is_e3va(other)):
        return {}
    mro = one.OPTIONS.__mro__
    common = next(each for each in mro if issubclass(other.OPTIONS, each))
    names = {*common.names()} - {'taps'}
    return {key: value for key, value in before.items() if key in names}


def _undecided(tuner: Mapping) -> dict:
    """A tuner without what a preset decides on, and without the trunk's."""
    decided = {'preset'}.union(*PRESETS.values())
    return {
        key: value
        for key, value in tuner.items()
        if key not in decided and not key.startswith('trunk_')
    }


def _class_of(tuner: Mapping) -> type:
    return find_tuner(tuner.get('type', 'E3VA'))


def _is_e3va(tuner_class: type) -> bool:
    return tuner_class.__name__.startswith('E3VA')


def side_path_of(preset: str, tuner: Mapping) -> dict:
    """A side path from the tuner of a config.

    Args:
        preset (str): ``'exact'`` or ``'lean'``: what they decide on is
            dropped from ``tuner``. ``'frozen-same'`` or ``'frozen-lean'``:
            a trunk without one.
        tuner (Mapping): Any; what is inside a trunk leaves nothing, and of
            a side path of others the options of the trunk are left.
    """
    tuner_class = _class_of(tuner)
    if tuner_class.HAS_GRAPH:
        tuner = {}
    if preset.startswith('frozen'):
        trunk = {
            key: value
            for key, value in tuner.items()
            if key == 'preset' or key.startswith('trunk_')
        }
        if preset == 'frozen-lean':
            trunk = dict(preset='lean')
        return dict(type='NoSidePath', train_output_norms=False, **trunk)
    own = _undecided(tuner) if _is_e3va(tuner_class) else {}
    return {'type': 'E3VA', **own, 'preset': preset}


def _full_name(config: Mapping) -> str:
    kind = config.get('type', '')
    return scoped_name(kind) if callable(kind) else kind


def _is_ours(config: Mapping) -> bool:
    return _full_name(config) in NAMES


def _drop_weights(node) -> None:
    """Remove what would load weights, at any depth, and do without."""
    if isinstance(node, Mapping):
        for key in ('init_cfg', 'pretrained'):
            node.pop(key, None)
        if _is_ours(node):
            node['allow_random_trunk'] = True
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            _drop_weights(value)
