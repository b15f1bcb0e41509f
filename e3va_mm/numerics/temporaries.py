"""How much is worked on at a time, by device."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# What a processor's cache holds.
CPU_BYTES = 4 * 2**20
# A launch costs more than a trip through memory; this bounds the peak alone.
GPU_BYTES = 256 * 2**20

_AS_ON_GPU = ContextVar('as_on_gpu', default=False)


def runs_as_on_gpu(device: torch.device) -> bool:
    """Whether few large kernels are better than many small ones."""
    return device.type != 'cpu' or _AS_ON_GPU.get()


def temporary_bytes(device: torch.device) -> int:
    """Bytes of temporaries that may be there at once."""
    return GPU_BYTES if runs_as_on_gpu(device) else CPU_BYTES


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, a CPU runs the operations that a GPU would."""
    token = _AS_ON_GPU.set(True)
    try:
        yield
    finally:
        _AS_ON_GPU.reset(token)
