"""Bytes of live tensor storages, moment by moment, on any device.

torch's own ``torch.distributed._tools.MemTracker`` refuses models that have
frozen parameters (it hooks the gradient of every one), so this counts itself,
by the same means: a dispatch mode sees every new tensor, a weak reference on
its storage sees it go.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are alive.

    Views share a storage and count once. What operators use inside, and what
    other libraries hold, is not seen.

    Args:
        held (Iterable[Tensor]): Tensors that are alive already: weights,
            buffers, optimizer state. Defaults to none.

    Attributes:
        live (int): Bytes alive now.
        peak (int): The most bytes that were alive at any moment.

    Examples:
        >>> with LiveBytes() as count:
        ...     a = torch.zeros(256)  # float32
        ...     b = a[:2]
        >>> count.live, count.peak
        (1024, 1024)
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._references: dict[int, weakref.ref] = {}
        for tensor in held:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references:
            return
        size = storage.nbytes()

        def gone(reference: weakref.ref) -> None:
            if self._references.get(key) is reference:
                del self._references[key]
                self.live -= size

        self._references[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Arguments too: a tensor may have come from elsewhere, e.g. numpy.
        leaves, _ = tree_flatten((args, kwargs, result))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._see(leaf)
        return result
