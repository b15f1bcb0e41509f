"""Registries of the scope ``e3va_mm``, children of mmengine's.

A config names our classes with the scope, ``type='e3va_mm.X'``; mmengine then
imports this module and, at the first lookup, the package in ``locations``, so
that no config needs ``custom_imports``.

Raises:
    E3VAError: If a framework is installed twice, or mmengine is missing.
"""

from typing import Any

from e3va_mm.frameworks.distributions import check_distributions

check_distributions()  # before mmengine, which may be a mixture of two

from mmengine import registry as mmengine  # noqa: E402


def install() -> None:
    """Change the frameworks as docs/frameworks.md lists it.

    Called by the first lookup in one of the registries below; call it before
    a framework is imported or a checkpoint is read without one. More calls
    change nothing.
    """
    # Here, or mmengine would hide that an import failed: it takes this module
    # for missing then.
    from e3va_mm.frameworks.patches import install

    install(read=_read_checkpoint, check=_check_adapter)


def _read_checkpoint(address: str, map_location: Any = None) -> dict:
    from e3va_mm.weights import read_checkpoint

    return read_checkpoint(address, map_location)


def _check_adapter(model: Any, state: dict) -> None:
    from e3va_mm.weights import check_adapter

    check_adapter(model, state)


class _Registry(mmengine.Registry):
    """A registry whose first lookup calls :func:`install`."""

    def import_from_location(self) -> None:
        install()
        super().import_from_location()


# manage backbones, tuners and their parts
MODELS = _Registry(
    'model',
    parent=mmengine.MODELS,
    scope='e3va_mm',
    locations=['e3va_mm.models'],
)
# manage data sets
DATASETS = _Registry(
    'dataset',
    parent=mmengine.DATASETS,
    scope='e3va_mm',
    locations=['e3va_mm.multi_task', 'e3va_mm.engine.fixed_views'],
)
# manage hooks
HOOKS = _Registry(
    'hook',
    parent=mmengine.HOOKS,
    scope='e3va_mm',
    locations=[
        'e3va_mm.engine.hooks',
        'e3va_mm.preflight',
        'e3va_mm.measure.measure_hook',
    ],
)
# manage constructors of optimizer wrappers
OPTIM_WRAPPER_CONSTRUCTORS = _Registry(
    'optimizer wrapper constructor',
    parent=mmengine.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='e3va_mm',
    locations=['e3va_mm.engine.optim'],
)
# manage wrappers of models for several processes
MODEL_WRAPPERS = _Registry(
    'model wrapper',
    parent=mmengine.MODEL_WRAPPERS,
    scope='e3va_mm',
    locations=['e3va_mm.engine.optim'],
)
