"""The optimizer constructor under its name in configs."""

from e3va_mm.frameworks.optimizers import SidePathOptimWrapperConstructor
from e3va_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['SidePathOptimWrapperConstructor']

OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    module=SidePathOptimWrapperConstructor
)
