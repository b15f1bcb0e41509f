"""Bytes that a forward pass keeps for the backward pass, and where.

Counted by live storages: a tensor on a ``ctx``, a module or a buffer is found
as well as one that autograd saves.
"""

import gc
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves

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
    known = [*module.parameters(), *module.buffers()]
    known += filter(torch.is_tensor, tree_leaves((inputs, kwargs)))
    with torch.enable_grad(), LiveBytes(known) as count:
        outputs = module(*inputs, **kwargs)
    # The nodes hold what is kept as the sum of the outputs would.
    nodes = [
        leaf.grad_fn for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)
    ]
    del outputs
    gc.collect()
    kept = sum(count.by_place().values())
    del nodes
    return kept


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
    return _summed(sizes, lambda names: depth)


def kept_by_part(kept_modules: Mapping[str, int]) -> dict[str, int]:
    """Sum the bytes kept by module to parts that a config names.

    Args:
        kept_modules (Mapping[str, int]): Module path to bytes.

    Returns:
        dict[str, int]: ``backbone``, ``neck``, ``roi_head.bbox_head.0``... to
        bytes, the largest first.
    """

    def depth(names: list[str]) -> int:
        length = 2 if names[0] == 'roi_head' else 1
        one_of_several = len(names) > length and names[length].isdigit()
        return length + one_of_several

    return _summed(kept_modules, depth)


def _summed(
    sizes: Mapping[str, int], depth: Callable[[list[str]], int]
) -> dict[str, int]:
    sums: dict[str, int] = {}
    for path, size in sizes.items():
        names = path.split('.')
        short = '.'.join(names[: depth(names)])
        sums[short] = sums.get(short, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


class ModulePath:
    """Returns, when called, the path of the module whose forward runs now.

    A context manager. torch's own ``ModTracker`` would hook gradients too and
    so keep tensors alive.

    Args:
        model (nn.Module): The root, whose path is ``''``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []

    def __call__(self) -> str:
        """The dotted path of the innermost module, or ``''``."""
        return self._running[-1] if self._running else ''

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
            self._running.append(self._names[module])

    def _leave_module(self, module: nn.Module, args: tuple, output) -> None:
        if module in self._names:
            self._running.pop()
