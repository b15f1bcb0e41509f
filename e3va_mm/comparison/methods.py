"""The tuning methods of a comparison, as configs."""

import copy
import inspect
from collections.abc import Mapping

from mmengine.config import Config, ConfigDict

from e3va_mm.backbones.stock import stock_class
from e3va_mm.errors import ConfigError
from e3va_mm.measure.variants import (
    METHODS,
    framework,
    own_backbone,
    rival_backbone,
    side_path_of,
    stock_backbone,
    type_name,
)

PAPER = 'e3va_mm.E3VASidePath'
# Beside it: what is set of the side path.
SIDE_PATHS: dict[str, Mapping] = {
    'e3va': dict(type=PAPER),
    'e3va-mix': dict(type='e3va_mm.E3VAMixSidePath'),
}


def method_config(config: Config, method: str) -> Config:
    """The config of a method: another backbone, and nothing else.

    No method has stochastic depth: a frozen trunk has none.

    Args:
        config (Config): Of a detector or segmentor, whatever its method.
        method (str): A key of ``METHODS`` or ``SIDE_PATHS``.

    Returns:
        Config: A changed copy.

    Raises:
        ConfigError: If there is no such method.
    """
    if method not in (*METHODS, *SIDE_PATHS):
        raise ConfigError(
            f'Methods are {", ".join((*METHODS, *SIDE_PATHS))}, but got '
            f'{method!r}.'
        )
    config = copy.deepcopy(config)
    backbone = config.model.backbone
    kind = type_name(config, backbone)
    stock = stock_backbone(backbone, kind, framework(config))
    if method in SIDE_PATHS:
        changed = ConfigDict(own_backbone(backbone, kind))
        changed.side_path = _side_path(
            SIDE_PATHS[method], changed.get('side_path') or {}
        )
    else:
        changed = rival_backbone(config, method)
    # Left out, it would be the class's own.
    if 'drop_path_rate' in _parameters(type_name(config, stock)):
        changed.get('trunk', changed).drop_path_rate = 0.0
    config.model.backbone = changed
    return config


def _side_path(own: Mapping, given: Mapping) -> dict:
    """A side path of a kind, with what a config sets that all kinds have."""
    kind = own.get('type', PAPER)
    if given.get('type', PAPER) != kind:
        given = {k: v for k, v in given.items() if k not in ('width', 'taps')}
    return {**side_path_of('exact', given), **own, 'type': kind}


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    """What the class of a stock backbone takes."""
    return inspect.signature(stock_class(kind)).parameters


def run_config(config: Config, lr: float, seed: int) -> Config:
    """The config of one run: the same schedule for every method.

    Args:
        config (Config): Of a method.
        lr (float): Learning rate of the optimizer.
        seed (int): Of the order of the pictures and of what is drawn.

    Returns:
        Config: A changed copy.
    """
    config = copy.deepcopy(config)
    config.optim_wrapper.optimizer.lr = lr
    config.randomness = dict(config.get('randomness', {}), seed=seed)
    # Runs beside each other must not fight for cores.
    for name in ('train', 'val', 'test'):
        loader = config[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.pop('prefetch_factor', None)
    # The last checkpoint alone: what is compared has seen the whole schedule.
    schedule = config.train_cfg
    length = schedule.get('max_epochs') or schedule.max_iters
    schedule.val_interval = length
    hooks = config.default_hooks
    hooks.checkpoint = dict(
        hooks.get('checkpoint') or dict(type='CheckpointHook'),
        max_keep_ckpts=1,
        save_best=None,
    )
    return config
