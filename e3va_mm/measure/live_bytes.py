"""Bytes of live tensor storages by category, moment by moment.

torch's own ``torch.distributed._tools.MemTracker`` refuses models that have
frozen parameters (it hooks the gradient of every one), so this counts itself,
by the same means: a dispatch mode sees every new tensor, a weak reference on
its storage sees it go.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_flatten

from e3va_mm.errors import E3VAError
from e3va_mm.frameworks.autograd import in_backward

# The first whose own MemTracker does the same.
OLDEST_TORCH = '2.4'
WEIGHTS, GRADIENTS, OPTIMIZER, KEPT, TEMPORARIES = CATEGORIES = (
    'weights',
    'gradients',
    'optimizer',
    'kept',
    'temporaries',
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are alive.

    Views share a storage and count once. Every storage is of one category:

    * ``weights`` and ``optimizer``: those given, buffers being weights;
    * ``gradients``: the ``.grad`` of a given weight;
    * ``kept``: what forward has left alive when backward begins, whoever
      holds it: autograd, a ctx, a module, or Python (as it does the batch);
    * ``temporaries``: all others.

    What a storage turns out to be it has been from its beginning: the figures
    of a peak in forward say how much of it was kept.

    What operators use inside, and what other libraries hold, is not seen. On
    an accelerator only its own storages count.

    Args:
        weights (nn.Module | Iterable[Tensor]): Parameters and buffers. The
            first says which type of device counts; without any, all do.
            Defaults to none.
        optimizer (object, optional): An optimizer, or a wrapper of one: all
            tensors in its ``state_dict()`` are its state, also those that are
            made while counting. Defaults to None.
        place (Callable, optional): Called at the birth of a storage, says
            where in the model that is. Defaults to ``''`` for all.

    Attributes:
        live (int): Bytes alive now.
        now (dict[str, int]): The same by category.
        peak (int): The most bytes that were alive at any moment.
        at_peak (dict[str, int]): The same by category.
        kept_at_backward (dict[str, int]): Kept bytes by ``place`` when the
            last backward began.

    Raises:
        E3VAError: If torch is too old.

    Examples:
        >>> with LiveBytes() as count:
        ...     a = torch.zeros(256)  # float32
        ...     b = a[:2]
        >>> count.live, count.peak
        (1024, 1024)
    """

    def __init__(
        self,
        weights: nn.Module | Iterable[Tensor] = (),
        optimizer: object | None = None,
        place: Callable[[], str] = str,
    ) -> None:
        super().__init__()
        if digit_version(torch.__version__) < digit_version(OLDEST_TORCH):
            raise E3VAError(
                f'Counting live tensors needs torch {OLDEST_TORCH}, but this '
                f'is {torch.__version__}, which crashes at weak references '
                'to storages. Measure in an environment with a newer torch.'
            )
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.peak = 0
        self.at_peak = dict(self.now)
        self.kept_at_backward: dict[str, int] = {}
        self._storages: dict[int, _Storage] = {}
        self._births = self._births_at_peak = 0
        self._in_backward = False
        self._place = place
        self._optimizer = optimizer
        if isinstance(weights, nn.Module):
            weights = [*weights.parameters(), *weights.buffers()]
        weights = list(weights)
        self._device = weights[0].device.type if weights else None
        self._trainable = [w for w in weights if w.requires_grad and w.is_leaf]
        for weight in weights:
            self._see(weight, WEIGHTS)
        self._see_optimizer()
        for weight in self._trainable:
            self._see_gradient(weight)

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return sum(self.now.values())

    def by_place(self) -> dict[str, int]:
        """Bytes alive now that are neither given nor gradients, by place."""
        sizes: dict[str, int] = {}
        for storage in list(self._storages.values()):
            if storage.category in (KEPT, TEMPORARIES):
                sizes.setdefault(storage.place, 0)
                sizes[storage.place] += storage.size
        return sizes

    def __enter__(self) -> 'LiveBytes':
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._see_gradient)
            for weight in self._trainable
        ]
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._see_optimizer()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        backward = in_backward()
        if backward and not self._in_backward:
            self._begin_backward()
        self._in_backward = backward
        result = func(*args, **(kwargs or {}))
        # Arguments too: a tensor may have come from elsewhere, e.g. numpy.
        leaves, _ = tree_flatten((args, kwargs, result))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _begin_backward(self) -> None:
        for storage in list(self._storages.values()):
            if storage.category == TEMPORARIES:
                self._move(storage, KEPT)
        self.kept_at_backward = self.by_place()

    def _see_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._see(weight.grad, GRADIENTS)

    def _see_optimizer(self) -> None:
        if self._optimizer is not None:
            leaves, _ = tree_flatten(self._optimizer.state_dict())
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    self._see(leaf, OPTIMIZER)

    def _see(self, tensor: Tensor, category: str | None = None) -> None:
        """Take in what is new, its new size, or what it turns out to be."""
        for storage in _untyped_storages(tensor):
            if self._device not in (None, storage.device.type):
                continue
            known = self._storages.get(storage._cdata)
            if known is None:
                self._add(storage, category or TEMPORARIES)
                continue
            if category is not None:
                self._move(known, category)
            if known.size != storage.nbytes():
                self._grow(known, storage.nbytes() - known.size)

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata

        def gone(reference: weakref.ref) -> None:
            known = self._storages.pop(key)
            self.now[known.category] -= known.size

        reference = weakref.ref(storage, gone)
        known = _Storage(reference, category, self._place())
        self._storages[key] = known
        self._grow(known, storage.nbytes())

    def _grow(self, storage: '_Storage', size: int) -> None:
        self._births += 1
        storage.born = self._births
        storage.size += size
        self.now[storage.category] += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = dict(self.now)
            self._births_at_peak = self._births

    def _move(self, storage: '_Storage', category: str) -> None:
        if storage.category in (category, WEIGHTS, OPTIMIZER):
            return
        figures = [self.now]
        if storage.born <= self._births_at_peak:  # and it has not died since
            figures.append(self.at_peak)
        for sizes in figures:
            sizes[storage.category] -= storage.size
            sizes[category] += storage.size
        storage.category = category


@dataclass
class _Storage:
    """What is known of a storage that is alive."""

    reference: weakref.ref
    category: str
    place: str
    size: int = 0
    born: int = 0


def _untyped_storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Storages of a tensor: several for a quantised weight, none sparse."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _untyped_storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
