"""The optimizer constructor, and DDP on CPUs, under their names in configs."""

from e3va_mm.frameworks.cpu_processes import GlooDistributedDataParallel
from e3va_mm.frameworks.optimizer_groups import SidePathOptimWrapperConstructor
from e3va_mm.registry import MODEL_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['GlooDistributedDataParallel', 'SidePathOptimWrapperConstructor']

MODEL_WRAPPERS.register_module(module=GlooDistributedDataParallel)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    module=SidePathOptimWrapperConstructor
)
