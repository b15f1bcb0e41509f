"""Building the stock backbone that is to be tuned, from a config."""

import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.distributions import PACKAGES
from e3va_mm.registry import MODELS
from e3va_mm.utils import is_number, is_whole

# Arguments without effect -> the value at which they ask for nothing. Where
# gradients travel through the trunk, it has drop path and checkpoints as the
# stock one; what trains is decided by the tuner either way.
FREEZING: Mapping[str, object] = dict(
    frozen_stages=-1, norm_eval=False, frozen_exclude=['all']
)
WITHOUT_EFFECT: Mapping[str, object] = dict(
    drop_rate=0,
    attn_drop_rate=0,
    proj_drop_rate=0,
    drop_path_rate=0,
    with_cp=False,
    **FREEZING,
)
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'area')
# What stock code fails with over arguments that cannot be.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def current_scope() -> str | None:
    """The framework whose tools are running, if one is."""
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope else None


def init_cfg_of(
    init_cfg: Mapping | None, pretrained: str | None
) -> Mapping | None:
    """Where weights come from, in the current or the deprecated form.

    Raises:
        ConfigError: If both are set, or ``pretrained`` is no path.
    """
    if pretrained is None:
        return init_cfg
    if not (pretrained and isinstance(pretrained, (str, os.PathLike))):
        raise ConfigError(
            '`pretrained` of the backbone should be a path or URL, but got '
            f'{pretrained!r}.'
        )
    if init_cfg is not None:
        raise ConfigError(
            '`pretrained` and `init_cfg` of the backbone are both set; keep '
            '`init_cfg`.'
        )
    warnings.warn(
        '`pretrained` is deprecated, use `init_cfg`.', DeprecationWarning
    )
    return dict(type='Pretrained', checkpoint=pretrained)


def split_config(
    trunk: Mapping, init_cfg: Mapping | None
) -> tuple[type | str, dict, Mapping | None]:
    """The parts of a stock backbone's config inside one of ours.

    Args:
        trunk (Mapping): Config of the stock backbone.
        init_cfg (Mapping, optional): That of ours, around it.

    Returns:
        tuple[type | str, dict, Mapping | None]: The stock class, its
        arguments, and where its weights come from.

    Raises:
        ConfigError: If it is no config, or weights are named twice.
    """
    if not (isinstance(trunk, Mapping) and 'type' in trunk):
        raise ConfigError(
            '`backbone.trunk` should be the config of a stock backbone, '
            "such as dict(type='mmpretrain.ConvNeXt', arch='base'), but "
            f'got {trunk!r}.'
        )
    stock = dict(trunk)
    kind = stock.pop('type')
    pretrained = None
    if not isinstance(stock.get('pretrained'), bool):  # a switch of timm's
        pretrained = stock.pop('pretrained', None)
    inner = init_cfg_of(stock.pop('init_cfg', None), pretrained)
    if inner is not None and init_cfg is not None:
        raise ConfigError(
            '`init_cfg` is set in `backbone` and in `backbone.trunk`; '
            'keep one.'
        )
    return kind, stock, inner or init_cfg


def find_class(name: object) -> type | None:
    """The class that a config means by a name, or itself; None if none."""
    if isinstance(name, str) and all(map(str.isidentifier, name.split('.'))):
        return MODELS.get(name)
    return name if isinstance(name, type) else None


def stock_class(name: str | type) -> type:
    """The stock class that a config means.

    Raises:
        ConfigError: If there is none, or its package cannot be imported.
    """
    scope = name.partition('.')[0] if isinstance(name, str) else None
    if scope in PACKAGES and not importlib.util.find_spec(scope):
        raise ConfigError(
            f'The trunk {name} needs {scope}, which is not installed: `pip '
            f'install {PACKAGES[scope]}`.'
        )
    found = find_class(name)
    if found is None:
        raise ConfigError(
            f'There is no backbone {name!r} to take as a trunk (`trunk.type`, '
            '`trunk_type`). Name it with its scope, such as '
            "'mmpretrain.VisionTransformer'; a class of your own needs "
            '`custom_imports`.'
        )
    return found


def build_stock(
    kind: type | str,
    arguments: Mapping,
    drop_path: float | None = None,
) -> nn.Module:
    """The stock backbone, without the arguments that have no effect.

    Args:
        kind (type | str): The stock class, or its name in a config.
        arguments (Mapping): Of the stock class.
        drop_path (float, optional): Stochastic depth of a trunk without a
            graph; None for one that gradients travel through, which takes
            that of ``arguments``.

    Raises:
        ConfigError: If an argument is unknown or refused by the class, or
            ``drop_path`` is asked for where there is none.
    """
    cls = stock_class(kind)
    parameters, open_ended = _parameters(cls)
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not open_ended:
        raise ConfigError(
            f'`{unknown[0]}` is no argument of {cls.__module__}.'
            f'{cls.__name__}, which is the trunk. It takes '
            f'{", ".join(parameters)}.'
        )
    without = FREEZING if drop_path is None else WITHOUT_EFFECT
    ignored = [
        name
        for name, nothing in without.items()
        if name in arguments and arguments[name] != nothing
    ]
    if ignored:
        print_log(
            f'{", ".join(ignored)}: without effect on the trunk '
            f'{cls.__name__}, of which the tuner says what trains.',
            logger='current',
        )
    own = {k: v for k, v in arguments.items() if k not in without}
    if drop_path is not None and 'drop_path_rate' in parameters:
        own['drop_path_rate'] = drop_path
    elif drop_path:
        raise ConfigError(
            f'`tuner.trunk_drop_path` is {drop_path}, but {cls.__name__} has '
            'no `drop_path_rate`. Leave it out.'
        )
    try:
        _check_values(own, parameters)
        return cls(**own)
    except REFUSALS as error:
        changed = ', '.join(
            f'{name}={value!r}'
            for name, value in own.items()
            if value is not parameters.get(name, REFUSALS)
        )
        raise ConfigError(
            f'The trunk {cls.__module__}.{cls.__name__} refuses its '
            f'arguments: {error or type(error).__name__}. Of these, other '
            f'than by default are {changed}.{_meaning(cls, own)}'
        ) from error


def _meaning(cls: type, own: Mapping) -> str:
    """The sizes that the class understands by the name of an ``arch``."""
    arch, zoo = own.get('arch'), getattr(cls, 'arch_zoo', {})
    if not isinstance(arch, str) or arch not in zoo:
        return ''
    sizes = ', '.join(f'{name}={size}' for name, size in zoo[arch].items())
    return f' By arch={arch!r} this class means {sizes}.'


def _check_values(own: Mapping, parameters: Mapping) -> None:
    """Refuse what stock code takes and fails with later, or without a word."""
    stages = own.get('depths', parameters.get('depths'))
    for name, value in own.items():
        if (
            name == 'out_indices'
            and isinstance(value, (list, tuple))
            and isinstance(stages, (list, tuple))
            and not all(is_whole(each, 0, len(stages) - 1) for each in value)
        ):
            raise ValueError(
                f'`{name}` should name some of the {len(stages)} stages, '
                f'counted from 0, but is {value!r}'
            )
        if name == 'interpolate_mode' and value not in INTERPOLATIONS:
            raise ValueError(
                f'`{name}` should be one of {INTERPOLATIONS}, but is {value!r}'
            )
        if name == 'qk_scale' and not (value is None or is_number(value)):
            raise ValueError(
                f'`{name}` should be a number or None, but is {value!r}'
            )
        if (
            is_number(parameters.get(name))
            and isinstance(value, (bool, float))
            and not is_number(value)
        ):
            # True, which is 1 for Python, and NaN.
            raise ValueError(f'`{name}` should be a number, but is {value}')
        if (
            name in ('depths', 'num_heads', 'strides')
            and isinstance(value, (list, tuple))
            and not all(type(each) is int and each > 0 for each in value)
        ):
            raise ValueError(
                f'`{name}` should hold a whole number above zero for each '
                f'stage, but is {value!r}'
            )


def _parameters(cls: type) -> tuple[dict[str, object], bool]:
    """Names that constructors along the bases take, with their defaults.

    And whether they take any other too.
    """
    names: dict[str, object] = {}
    open_ended = False
    for base in cls.__mro__:
        if '__init__' not in vars(base) or base.__module__.startswith('torch'):
            continue
        for p in inspect.signature(base.__init__).parameters.values():
            if p.kind is p.VAR_KEYWORD:
                open_ended = open_ended or base is cls
            elif p.kind is not p.VAR_POSITIONAL and p.name != 'self':
                names.setdefault(p.name, p.default)
        if not open_ended:
            break  # nothing is passed on
    return names, open_ended
