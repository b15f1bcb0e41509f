"""Stock arguments that mean something else over a frozen trunk."""

import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.utils import is_number

# Argument -> the value at which it does nothing.
WITHOUT_EFFECT: Mapping[str, object] = dict(
    drop_rate=0,
    attn_drop_rate=0,
    proj_drop_rate=0,
    drop_path_rate=0,
    with_cp=False,
    frozen_stages=-1,
    norm_eval=False,
    frozen_exclude=['all'],
)

# The same over a trunk that a gradient travels through: it has drop path and
# checkpoints as the stock one, but who trains is decided elsewhere.
FREEZING: Mapping[str, object] = {
    name: WITHOUT_EFFECT[name]
    for name in ('frozen_stages', 'norm_eval', 'frozen_exclude')
}

ALLOWED: Mapping[str, tuple] = dict(
    # Of position embeddings, by torch's names.
    interpolate_mode=('nearest', 'bilinear', 'bicubic', 'area'),
)
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


def init_cfg_of(
    init_cfg: Mapping | None, pretrained: str | None
) -> Mapping | None:
    """Where weights come from, whichever way it is said.

    Raises:
        ConfigError: If it is said twice, or is no path.
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


def taken_apart(
    trunk: Mapping, init_cfg: Mapping | None
) -> tuple[type | str, dict, Mapping | None]:
    """The config of a stock backbone inside one of ours.

    Args:
        trunk (Mapping): That of the stock backbone.
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
    inner = init_cfg_of(
        stock.pop('init_cfg', None),
        # A switch of timm's, not a path.
        stock.pop('pretrained', None)
        if not isinstance(stock.get('pretrained'), bool)
        else None,
    )
    if inner is not None and init_cfg is not None:
        raise ConfigError(
            '`init_cfg` is set in `backbone` and in `backbone.trunk`; '
            'keep one.'
        )
    return kind, stock, inner or init_cfg


def say_without_effect(
    owner: str, arguments: Mapping, without: Mapping = WITHOUT_EFFECT
) -> list[str]:
    """Log which arguments do nothing here, in one line; their names."""
    named = [
        name
        for name, nothing in without.items()
        if name in arguments and arguments[name] != nothing
    ]
    if named:
        print_log(
            f'{", ".join(named)}: without effect on the frozen trunk of '
            f'{owner}.',
            logger='current',
        )
    return named


def registered(name: object) -> type | None:
    """The class that a config means by a name, or itself; None if none."""
    if isinstance(name, str) and all(map(str.isidentifier, name.split('.'))):
        return MODELS.get(name)
    return name if isinstance(name, type) else None


def build_part(name: str, config: Mapping) -> object:
    """A part of a backbone, from the config under an argument's name.

    Raises:
        ConfigError: If an argument is unknown to its class.
    """
    try:
        return MODELS.build(dict(config))
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        raise ConfigError(f'`{name}` of the backbone: {error}.') from error


def stock_class(name: str | type) -> type:
    """The class that a config means.

    Raises:
        ConfigError: If there is none, or its package cannot be imported.
    """
    if isinstance(name, type):
        return name
    scope = name.partition('.')[0] if isinstance(name, str) else None
    if scope in ('mmdet', 'mmseg', 'mmpretrain') and not (
        importlib.util.find_spec(scope)
    ):
        package = {
            'mmdet': 'mmdetection',
            'mmseg': 'mmsegmentation',
        }.get(scope, scope)
        raise ConfigError(
            f'The trunk {name} needs {scope}, which is not installed: `pip '
            f'install onedl-{package}`.'
        )
    found = registered(name)
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
    drop_path: float = 0.0,
    without: Mapping = WITHOUT_EFFECT,
) -> object:
    """The stock backbone, without what has no effect.

    Args:
        kind (type | str): The stock class, or its name in a config.
        arguments (Mapping): Of the stock class.
        drop_path (float): Stochastic depth. Defaults to 0.
        without (Mapping): Arguments that do nothing. With its own
            ``drop_path_rate`` among those that do, ``drop_path`` is not read.

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
    given = {k: v for k, v in arguments.items() if k not in without}
    if 'drop_path_rate' not in without:
        pass
    elif 'drop_path_rate' in parameters:
        given['drop_path_rate'] = drop_path
    elif drop_path:
        raise ConfigError(
            f'`side_path.trunk_drop_path` is {drop_path}, but '
            f'{cls.__name__} has no `drop_path_rate`. Leave it out.'
        )
    try:
        _check_values(given, parameters)
        return cls(**given)
    except REFUSALS as error:
        own = ', '.join(
            f'{name}={value!r}'
            for name, value in given.items()
            if value is not parameters.get(name, REFUSALS)
        )
        raise ConfigError(
            f'The trunk {cls.__module__}.{cls.__name__} refuses its '
            f'arguments: {error or type(error).__name__}. Of these, other '
            f'than by default are {own}.'
        ) from error


def _check_values(given: Mapping, parameters: Mapping) -> None:
    """Refuse what stock code takes and fails with in the first step."""
    for name, value in given.items():
        allowed = ALLOWED.get(name)
        if allowed and value not in allowed:
            raise ValueError(
                f'`{name}` should be one of {allowed}, but is {value!r}'
            )
        default = parameters.get(name)
        if (
            is_number(default)
            and isinstance(value, (bool, float))
            and not is_number(value)
        ):
            # True, which is 1 for Python, and NaN.
            raise ValueError(f'`{name}` should be a number, but is {value}')


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


def current_scope() -> str | None:
    """The framework whose tools are running, if one is."""
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope else None
