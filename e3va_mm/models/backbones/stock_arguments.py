"""Stock arguments that mean something else over a frozen trunk."""

import importlib.util
import inspect
import warnings
from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from ...errors import ConfigError
from ...registry import MODELS

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


def init_cfg_of(
    init_cfg: Mapping | None, pretrained: str | None
) -> Mapping | None:
    """Where weights come from, whichever way it is said.

    Raises:
        ConfigError: If it is said twice.
    """
    if pretrained is None:
        return init_cfg
    if init_cfg is not None:
        raise ConfigError(
            '`pretrained` and `init_cfg` of the backbone are both set; keep '
            '`init_cfg`.'
        )
    warnings.warn(
        '`pretrained` is deprecated, use `init_cfg`.', DeprecationWarning
    )
    return dict(type='Pretrained', checkpoint=pretrained)


def say_without_effect(owner: str, arguments: Mapping) -> list[str]:
    """Log which arguments do nothing here, in one line; their names."""
    named = [
        name
        for name, nothing in WITHOUT_EFFECT.items()
        if name in arguments and arguments[name] != nothing
    ]
    if named:
        print_log(
            f'{", ".join(named)}: without effect on the frozen trunk of '
            f'{owner}.',
            logger='current',
        )
    return named


def stock_class(name: str) -> type:
    """The class that a config means.

    Raises:
        ConfigError: If there is none, or its package cannot be imported.
    """
    scope = name.partition('.')[0] if '.' in name else None
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
    found = MODELS.get(name)
    if found is None:
        raise ConfigError(
            f'There is no backbone {name!r} to take as a trunk. Name it with '
            "its scope, such as 'mmpretrain.VisionTransformer'; a class of "
            'your own needs `custom_imports`.'
        )
    return found


def build_stock(
    kind: type | str, arguments: Mapping, drop_path: float = 0.0
) -> object:
    """The stock backbone, without what has no effect.

    Args:
        kind (type | str): The stock class, or its name in a config.
        arguments (Mapping): Of the stock class.
        drop_path (float): Stochastic depth. Defaults to 0.

    Raises:
        ConfigError: If an argument is unknown, or ``drop_path`` is asked for
            where there is none.
    """
    cls = stock_class(kind) if isinstance(kind, str) else kind
    parameters, open_ended = _parameters(cls)
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not open_ended:
        raise ConfigError(
            f'`{unknown[0]}` is no argument of {cls.__module__}.'
            f'{cls.__name__}, which is the trunk. It takes '
            f'{", ".join(parameters)}.'
        )
    given = {k: v for k, v in arguments.items() if k not in WITHOUT_EFFECT}
    if 'drop_path_rate' in parameters:
        given['drop_path_rate'] = drop_path
    elif drop_path:
        raise ConfigError(
            f'`side_path.trunk_drop_path` is {drop_path}, but '
            f'{cls.__name__} has no `drop_path_rate`. Leave it out.'
        )
    try:
        return cls(**given)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'The trunk {cls.__module__}.{cls.__name__} refuses its '
            f'arguments: {error or type(error).__name__}.'
        ) from error


def _parameters(cls: type) -> tuple[list[str], bool]:
    """Names that constructors along the bases take; whether any other too."""
    names: dict[str, None] = {}
    open_ended = False
    for base in cls.__mro__:
        if '__init__' not in vars(base) or base.__module__.startswith('torch'):
            continue
        for p in inspect.signature(base.__init__).parameters.values():
            if p.kind is p.VAR_KEYWORD:
                open_ended = open_ended or base is cls
            elif p.kind is not p.VAR_POSITIONAL and p.name != 'self':
                names[p.name] = None
        if not open_ended:
            break  # nothing is passed on
    return list(names), open_ended


def current_scope() -> str | None:
    """The framework whose tools are running, if one is."""
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope else None
