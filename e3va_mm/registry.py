"""Registries of the scope ``e3va_mm``, children of mmengine's.

A config names our classes with the scope, ``type='e3va_mm.X'``; mmengine then
imports this module and the package in ``locations``, so that no config needs
``custom_imports``.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import Registry

from e3va_mm.frameworks.torchvision import declare_missing_ops

# Before a framework is imported, which may import torchvision.
declare_missing_ops()

# manage backbones, side paths and their parts
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='e3va_mm',
    locations=['e3va_mm.models'],
)
# manage data sets
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='e3va_mm',
    locations=['e3va_mm.multi_task'],
)
# manage hooks
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='e3va_mm',
    locations=[
        'e3va_mm.engine.hooks',
        'e3va_mm.preflight',
        'e3va_mm.measure.hook',
    ],
)
# manage constructors of optimizer wrappers
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='e3va_mm',
    locations=['e3va_mm.engine.optim'],
)
