"""Bytes that a forward pass keeps for the backward pass, and where.

Counted by live storages, whoever holds them: a tensor on a ``ctx``, a module
or a buffer is found as well as one that autograd saves.
"""

import gc
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_flatten

from e3va_mm.measure.live_bytes import LiveBytes


def kept_for_backward(module: nn.Module, *inputs, **kwargs) -> int:
    """Bytes that one forward pass keeps for backward.

    That is the bytes of live storages after the forward minus before it, the
    outputs themselves deleted, under a loss that keeps nothing, such as the
    sum of the outputs.

    Args:
        module (nn.Module): Called with the other arguments.
        *inputs: Positional arguments of the call.
        **kwargs: Its keyword arguments.

    Returns:
        int: Bytes. Parameters, buffers and inputs never count.

    Examples:
        >>> layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> kept_for_backward(layers, torch.zeros(4, 8))  # output of tanh
        128
    """
    return sum(kept_by_module(module, *inputs, **kwargs).values())


def kept_by_module(module: nn.Module, *inputs, **kwargs) -> dict[str, int]:
    """Bytes that one forward pass keeps, by the module that makes them.

    Args:
        module (nn.Module): Called with the other arguments; a detector with
            ``inputs``, ``data_samples`` and ``mode='loss'``.
        *inputs: Positional arguments of the call.
        **kwargs: Its keyword arguments.

    Returns:
        dict[str, int]: Dotted path to bytes, the largest first. Each storage
        counts once, for the innermost module in whose forward it was first
        seen; what belongs to no child is under ``''``.
    """
    given = [*module.parameters(), *module.buffers()]
    given += _tensors((inputs, kwargs))
    with (
        torch.enable_grad(),
        ModulePath(module) as path,
        LiveBytes(given, place=path) as count,
    ):
        outputs = module(*inputs, **kwargs)
    leaves, _ = tree_flatten(outputs)
    # The nodes hold what is kept as the sum of the outputs would.
    nodes = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor)]
    del outputs, leaves
    gc.collect()
    sizes = count.by_place()
    del nodes
    return _sorted(sizes)


def fold_paths(sizes: Mapping[str, int], depth: int) -> dict[str, int]:
    """Sum the bytes of modules to their ancestors at a depth.

    Args:
        sizes (Mapping[str, int]): Dotted path to bytes.
        depth (int): Names that are left of a path.

    Returns:
        dict[str, int]: Shorter paths to bytes, the largest first.

    Examples:
        >>> fold_paths({'neck.convs.0': 2, 'neck.convs.1': 3}, 2)
        {'neck.convs': 5}
    """
    folded: dict[str, int] = {}
    for path, size in sizes.items():
        short = '.'.join(path.split('.')[:depth])
        folded[short] = folded.get(short, 0) + size
    return _sorted(folded)


class ModulePath:
    """Says, when called, which module's forward runs now.

    A context manager; torch's own ``ModTracker`` would hook gradients too and
    so keep tensors alive.

    Args:
        model (nn.Module): The root, whose path is ``''``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []

    def __call__(self) -> str:
        """The dotted path of the innermost module, or ``''``."""
        return self._names[self._running[-1]] if self._running else ''

    def __enter__(self) -> 'ModulePath':
        self._handles = (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        )
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._running.clear()

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if module in self._names:
            self._running.append(module)

    def _leave_module(self, module: nn.Module, args: tuple, output) -> None:
        if module in self._names:
            self._running.pop()


def _tensors(value) -> Iterator[Tensor]:
    """Tensors in arguments: also in data samples, which are plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, '__dict__'):
        yield from _tensors(vars(value))


def _sorted(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
