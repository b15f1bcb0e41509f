"""Memory of the process itself."""

import ctypes

from mmengine.device import get_device

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let memory that was freed stay with the process, to be used again.

    A training step asks for the same large blocks again and again. On a GPU
    torch keeps them; on a CPU glibc gives them back to the system, which then
    has to clear fresh pages. Call it before the first step; it holds until
    the process ends.

    Returns:
        bool: Whether it does. Not where an accelerator does the work, nor
        with another C library.
    """
    if get_device() != 'cpu':
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # All blocks from the heap, and the heap is never cut.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
