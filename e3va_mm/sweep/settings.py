"""The runs of a sweep: their names and their configs."""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmengine.config import Config

from e3va_mm.errors import ConfigError
from e3va_mm.utils.configs import class_name

# Runs on one pass have one data pipeline and one loop.
SAME = (
    *('default_scope', 'train_dataloader', 'train_cfg', 'val_dataloader'),
    *('val_cfg', 'val_evaluator', 'env_cfg', 'data_preprocessor'),
)
REFUSED_HOOKS = {
    'ExactResumeHook': 'takes the data loader for its own',
    'MeasureHook': 'would measure the runs beside it',
    'TrunkCacheHook': 'keeps what one run reads of the trunk',
}


class Setting(NamedTuple):
    """One run of a sweep.

    Attributes:
        options (dict[str, Any]): What its config has otherwise, by dotted
            paths.
        seed (int): Of all in it that is random, but for the data.
        name (str): Also its folder.
    """

    options: dict[str, Any]
    seed: int
    name: str


def settings_of(
    options: Mapping[str, Any], seeds: Sequence[int]
) -> list[Setting]:
    """All combinations of values and seeds.

    Args:
        options (Mapping[str, Any]): A list of values, or one, by the dotted
            path of an option.
        seeds (Sequence[int]): The seeds.

    Raises:
        ConfigError: If two runs have one name.

    Examples:
        >>> options = {'optim_wrapper.optimizer.lr': [1e-3, 2e-3]}
        >>> [each.name for each in settings_of(options, [0])]
        ['lr=0.001_seed=0', 'lr=0.002_seed=0']
    """
    values = [v if isinstance(v, list) else [v] for v in options.values()]
    labels = _labels(list(options))
    found = []
    for chosen in itertools.product(*values):
        for seed in seeds:
            parts = [*zip(labels, chosen, strict=True), ('seed', seed)]
            text = '_'.join(f'{label}={value}' for label, value in parts)
            name = re.sub(r'[^\w.=+-]+', '-', text)
            own = dict(zip(options, chosen, strict=True))
            found.append(Setting(own, seed, name))
    names = [setting.name for setting in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f'Runs of a sweep should differ, but two are {name}. Name '
                'each value of an option once.'
            )
    return found


def _labels(paths: Sequence[str]) -> list[str]:
    """The ends of dotted paths, as long as tells them apart."""
    found = []
    for path in paths:
        parts = path.split('.')
        for length in range(1, len(parts) + 1):
            label = '.'.join(parts[-length:])
            if sum(f'.{p}'.endswith(f'.{label}') for p in paths) == 1:
                break
        found.append(label)
    return found


def setting_config(config: Config, setting: Setting) -> Config:
    """The config of a run, without its work folder.

    Args:
        config (Config): That of the sweep.
        setting (Setting): What the run has otherwise.

    Raises:
        ConfigError: If an option belongs to no part of the config.
    """
    config = copy.deepcopy(config)
    for path in setting.options:
        part = path.split('.')[0]
        if part not in config:
            raise ConfigError(
                f'--set {path}: expected an option of some part of the '
                f'config, but there is no {part}; it has '
                f'{", ".join(sorted(config))}.'
            )
        if part == 'randomness':
            raise ConfigError('--set: give seeds by --seeds N.')
    config.merge_from_dict(copy.deepcopy(setting.options))
    config.randomness = dict(config.get('randomness', {}), seed=setting.seed)
    return config


def check_together(configs: Mapping[str, Config]) -> None:
    """Refuse configs that cannot train on one pass of one trunk.

    Args:
        configs (Mapping[str, Config]): The configs by the name of the run.

    Raises:
        ConfigError: If they differ in the data, the loop or the precision,
            or have a part that cannot be one of several.
    """
    (first, base), *others = configs.items()
    facts = _facts(base)
    for name, config in others:
        for key, value in _facts(config).items():
            if value != facts[key]:
                raise ConfigError(
                    'Runs on one pass of the trunk should have the same '
                    f'`{key}`, but that of {first} is {facts[key]} and that '
                    f'of {name} {value}. Sweep over it by a sweep for each '
                    'value.'
                )
    for name, config in configs.items():
        reason = _refusal(config)
        if reason:
            raise ConfigError(
                f'{name} cannot be one run of several: {reason}. Leave it '
                'out, or train apart: `e3va train`.'
            )


def _facts(config: Config) -> dict[str, Any]:
    """What must be the same, by the name of the option."""
    wrapper, model = config.optim_wrapper, config.model
    own = model.get('data_preprocessor')
    found = {key: config.get(key) for key in SAME}
    return {
        **{
            k: getattr(v, 'to_dict', lambda v=v: v)() for k, v in found.items()
        },
        'model.data_preprocessor': own and own.to_dict(),
        'optim_wrapper.type': class_name(wrapper) or 'OptimWrapper',
        'optim_wrapper.dtype': wrapper.get('dtype'),
    }


def _refusal(config: Config) -> str | None:
    """What in a config cannot be one of several, if anything."""
    for hook in config.get('custom_hooks') or ():
        if class_name(hook) in REFUSED_HOOKS:
            return f'{class_name(hook)} {REFUSED_HOOKS[class_name(hook)]}'
    for key in ('runner_type', 'strategy', 'compile'):
        if config.get(key):
            return f'`{key}` is set'
    if config.get('launcher', 'none') != 'none':
        return f'`launcher` is {config.launcher}, and one process trains all'
    return None
