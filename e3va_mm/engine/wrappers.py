"""The wrapper of CPU processes under its name in configs."""

from e3va_mm.frameworks.distributed import GlooDistributedDataParallel
from e3va_mm.registry import MODEL_WRAPPERS

__all__ = ['GlooDistributedDataParallel']

MODEL_WRAPPERS.register_module(module=GlooDistributedDataParallel)
