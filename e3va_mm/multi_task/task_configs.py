"""Configs of the tasks that are trained together."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from mmengine.config import Config
from mmengine.model import ModuleDict

from e3va_mm.errors import ConfigError

# Part of parameter names and log lines; a "loss" in it would make one of all
# that is logged.
NAME = re.compile(r'(?!\w*loss)[A-Za-z_]\w*')


def task_configs(tasks: Mapping) -> dict[str, Config]:
    """The configs of tasks, by name.

    Args:
        tasks (Mapping[str, str | Mapping]): Configs or their paths.

    Raises:
        ConfigError: If there is no task, or a name or a config is none.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError(
            '`tasks` should be a dict of configs by the name of the task, '
            f"such as dict(boxes='cascade.py', parts='upernet.py'), but got "
            f'{tasks!r}.'
        )
    found = {}
    for name, config in tasks.items():
        if not NAME.fullmatch(str(name)) or hasattr(ModuleDict, name):
            raise ConfigError(
                'The name of a task in `tasks` should be a word without '
                '"loss" that is no method of a module dict, but got '
                f'{name!r}.'
            )
        if isinstance(config, (str, PathLike)):
            if not Path(config).is_file():
                raise ConfigError(
                    f'`tasks.{name}`: {config}: no such config file.'
                )
            config = Config.fromfile(config)
        elif not isinstance(config, Config):
            config = Config(dict(config))
        for key in ('default_scope', 'model', 'train_dataloader'):
            if config.get(key) is None:
                raise ConfigError(
                    f'`tasks.{name}` should be a config with {key}, but it '
                    'has none.'
                )
        found[name] = config
    return found
