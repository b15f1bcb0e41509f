"""Bytes of live tensor storages by category, moment by moment.

``torch.distributed._tools.MemTracker`` refuses models that have frozen
parameters (it hooks the gradient of every one). The means are the same here: a
dispatch mode sees every new tensor, a weak reference sees its storage go.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from e3va_mm.frameworks.autograd import in_backward

WEIGHTS, GRADIENTS, OPTIMIZER, KEPT, TEMPORARIES = CATEGORIES = (
    'weights',
    'gradients',
    'optimizer',
    'kept',
    'temporaries',
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are alive.

    Views share a storage and count once. Every storage has one category:

    * ``weights`` and ``optimizer``: those passed in, buffers being weights;
    * ``gradients``: the ``.grad`` of a weight;
    * ``kept``: what is alive after forward when backward begins, whoever
      holds it: autograd, a ctx, a module, or Python (such as the batch);
    * ``temporaries``: all others.

    A storage has had its final category from birth: the figures of a peak
    during forward say how much of it was kept. Storages that operators use
    internally or other libraries hold are not seen. On an accelerator only its
    own storages count.

    Args:
        weights (nn.Module | Iterable[Tensor]): Parameters and buffers. The
            type of their device is the one that counts; without any, or with
            two, all do. Defaults to none.
        optimizer (object, optional): An optimizer or a wrapper of one: all
            tensors in its ``state_dict()`` are its state, also those made
            while counting. Defaults to None.
        place (Callable, optional): Called at the birth of a storage; returns
            where in the model that is. Defaults to ``''`` for all.

    Attributes:
        live (int): Bytes alive now.
        now (dict[str, int]): The same by category.
        peak (int): The most bytes alive at any moment.
        at_peak (dict[str, int]): The same by category.
        kept_at_backward (dict[str, int]): Kept bytes by ``place`` when the
            last backward began.

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
        devices = {weight.device.type for weight in weights}
        self._device = devices.pop() if len(devices) == 1 else None
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
        """Bytes of kept and temporary storages alive now, by place."""
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
            for storage in list(self._storages.values()):
                if storage.category == TEMPORARIES:
                    self._move(storage, KEPT)
            self.kept_at_backward = self.by_place()
        self._in_backward = backward
        result = func(*args, **(kwargs or {}))
        # Arguments too: a tensor may have come from elsewhere, e.g. numpy.
        self._see_all((args, kwargs, result))
        return result

    def _see_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._see(weight.grad, GRADIENTS)

    def _see_optimizer(self) -> None:
        if self._optimizer is not None:
            self._see_all(self._optimizer.state_dict(), OPTIMIZER)

    def _see_all(self, tree, category: str | None = None) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._see(leaf, category)

    def _see(self, tensor: Tensor, category: str | None = None) -> None:
        """Record a new storage, or a new size or category of a known one."""
        for storage in _untyped_storages(tensor):
            if self._device not in (None, storage.device.type):
                continue
            known = self._storages.get(storage._cdata)
            if known is None:
                known = self._add(storage, category or TEMPORARIES)
            elif category is not None:
                self._move(known, category)
            if known.size != storage.nbytes():
                self._grow(known, storage.nbytes() - known.size)

    def _add(self, storage: torch.UntypedStorage, category: str) -> '_Storage':
        key = storage._cdata

        def forget(reference: weakref.ref) -> None:
            known = self._storages.pop(key)
            self.now[known.category] -= known.size

        reference = weakref.ref(storage, forget)
        known = _Storage(reference, category, self._place())
        self._storages[key] = known
        return known

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
    reference: weakref.ref
    category: str
    place: str
    size: int = 0
    born: int = 0


def _untyped_storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Storages of a tensor: several of a quantised one, none if sparse."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _untyped_storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
