"""The tuning methods of a comparison, as configs."""

import copy
import inspect
from collections.abc import Mapping

from mmengine.config import Config, ConfigDict

from e3va_mm.backbones import tuned_config
from e3va_mm.backbones.stock import stock_class
from e3va_mm.errors import ConfigError
from e3va_mm.measure.variants import (
    SIDE_PATHS,
    TUNERS,
    framework,
    kind_of,
    named_tuner,
    side_path_of,
)
from e3va_mm.utils.configs import class_name

METHODS: dict[str, Mapping] = {
    'fixed' if name == 'frozen' else name: tuner
    for name, tuner in TUNERS.items()
}


def is_side_path(method: str) -> bool:
    """Whether no gradient of a method enters the trunk."""
    return kind_of(method) in SIDE_PATHS


def method_config(config: Config, method: str) -> Config:
    """The config of a method: another tuner, and nothing else.

    No method has stochastic depth: a frozen trunk has none. With a
    ``trunk_cache``, side paths and ``fixed`` train on features on disk, and
    methods inside the trunk run it, on fresh views.

    Args:
        config (Config): Of a detector or segmentor, whatever its method.
        method (str): A key of ``METHODS`` or ``SIDE_PATHS``, maybe with
            options of its tuner: ``'mona:last=4'``.

    Returns:
        Config: A changed copy.

    Raises:
        ConfigError: If there is no such method, or no such option of it.
    """
    if kind_of(method) not in (*METHODS, *SIDE_PATHS):
        raise ConfigError(
            f'Methods are {", ".join((*METHODS, *SIDE_PATHS))}, but got '
            f'{method!r}.'
        )
    config = copy.deepcopy(config)
    backbone = tuned_config(config.model.backbone, framework(config))
    backbone['tuner'] = named_tuner(method, backbone['tuner'], METHODS)
    if backbone.get('trunk_cache') and not is_side_path(method):
        if method == 'fixed':
            backbone['tuner'] = side_path_of('frozen-same', {})
        else:
            del backbone['trunk_cache']
            config.custom_hooks = [
                hook
                for hook in config.get('custom_hooks', ())
                if class_name(hook) != 'TrunkCacheHook'
            ]
    trunk = backbone.get('trunk')
    # Left out, it would be the default of the class.
    if trunk is None:
        backbone['drop_path_rate'] = 0.0
    elif 'drop_path_rate' in _parameters(trunk['type']):
        trunk['drop_path_rate'] = 0.0
    config.model.backbone = ConfigDict(backbone)
    return config


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of the class of a stock backbone."""
    return inspect.signature(stock_class(kind)).parameters


def run_config(config: Config, lr: float, seed: int) -> Config:
    """The config of one run: the same schedule for every method.

    Args:
        config (Config): Of a method.
        lr (float): Learning rate of the optimizer.
        seed (int): Of the order of the images and of all that is random.

    Returns:
        Config: A changed copy.
    """
    config = copy.deepcopy(config)
    config.optim_wrapper.optimizer.lr = lr
    config.randomness = dict(config.get('randomness', {}), seed=seed)
    # Runs beside each other must not fight for cores.
    for name in ('train', 'val', 'test'):
        loader = config.get(f'{name}_dataloader') or {}
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
