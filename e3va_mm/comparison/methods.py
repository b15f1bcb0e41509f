"""The tuning methods of a comparison, as configs."""

import copy
from collections.abc import Mapping

from mmengine.config import Config, ConfigDict

from ..errors import ConfigError
from ..measure.variants import (
    STOCK_SWINS,
    framework,
    own_backbone,
    stock_backbone,
    type_name,
)

# Inside the backbone.
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
# Beside it: what is set of the side path.
SIDE_PATHS: Mapping[str, Mapping] = {
    'e3va': {},
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
    if method in SIDE_PATHS:
        changed = ConfigDict(own_backbone(backbone, kind))
        changed.side_path = dict(
            changed.get('side_path') or {}, **SIDE_PATHS[method]
        )
    else:
        changed = stock_backbone(backbone, kind, framework(config))
        tuning = dict(METHODS[method])
        random = backbone.get('allow_random_trunk', False)
        if type_name(config, changed) in STOCK_SWINS:
            changed.update(
                type='e3va_mm.PETLSwinTransformer',
                method=tuning,
                allow_random_trunk=random,
            )
        else:
            changed = ConfigDict(
                type='e3va_mm.PETLBackbone',
                trunk=changed,
                method=tuning,
                allow_random_trunk=random,
            )
    for owner in (changed, changed.get('trunk', {})):
        if 'drop_path_rate' in owner:
            owner.drop_path_rate = 0.0
    config.model.backbone = changed
    return config


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
    config.randomness = dict(seed=seed)
    # Runs beside each other must not fight for cores.
    for name in ('train', 'val', 'test'):
        loader = config[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.pop('prefetch_factor', None)
    # One checkpoint, the last: what is compared has seen the whole schedule.
    schedule = config.train_cfg
    length = schedule.get('max_epochs') or schedule.max_iters
    schedule.val_interval = length
    hooks = config.default_hooks
    hooks.checkpoint = dict(
        hooks.get('checkpoint') or dict(type='CheckpointHook'),
        interval=length,
        max_keep_ckpts=1,
        save_best=None,
    )
    config.custom_hooks = [
        hook
        for hook in config.get('custom_hooks') or ()
        if hook['type'] != 'e3va_mm.ProgressBarHook'
    ]
    return config
