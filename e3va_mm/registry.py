"""Registries of the scope ``e3va_mm``, children of mmengine's.

A config names our classes with the scope, ``type='e3va_mm.X'``; mmengine then
imports this module and the package in ``locations``, so that no config needs
``custom_imports``.
"""

from e3va_mm.frameworks.distributions import check_distributions

# Before mmengine, which may be missing or a mixture of two distributions.
check_distributions()

from mmengine import registry as mmengine  # noqa: E402
from mmengine.registry import Registry  # noqa: E402

from e3va_mm.frameworks.torchvision import declare_missing_ops  # noqa: E402

# Before a framework is imported, which may import torchvision.
declare_missing_ops()

# manage backbones, side paths and their parts
MODELS = Registry(
    'model',
    parent=mmengine.MODELS,
    scope='e3va_mm',
    locations=['e3va_mm.models'],
)
# manage data sets
DATASETS = Registry(
    'dataset',
    parent=mmengine.DATASETS,
    scope='e3va_mm',
    locations=['e3va_mm.multi_task'],
)
# manage hooks
HOOKS = Registry(
    'hook',
    parent=mmengine.HOOKS,
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
    parent=mmengine.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='e3va_mm',
    locations=['e3va_mm.engine.optim'],
)
