"""Mixed precision on CPU, which mmengine's own wrapper refuses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map_only

HALF = torch.bfloat16


class CPUAmpOptimWrapper(OptimWrapper):
    """Runs forward passes and losses under autocast in bfloat16.

    mmcv's operators (nms, roi_align...) know no bfloat16 on CPU: for as long
    as a step runs they compute in float32 and return the type they received.
    Losses need no scaling. Takes the arguments of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """See the base class."""
        with (
            super().optim_context(model),
            torch.autocast('cpu', HALF),
            _mmcv_takes_half(),
        ):
            yield

    def update_params(self, *args, **kwargs) -> None:
        """See the base class."""
        with _mmcv_takes_half():
            super().update_params(*args, **kwargs)


@contextmanager
def _mmcv_takes_half() -> Iterator[None]:
    before = [
        (function, name, vars(function)[name])
        for function in Function.__subclasses__()
        for name in ('forward', 'backward')
        if function.__module__.startswith('mmcv.') and name in vars(function)
    ]
    for function, name, method in before:
        setattr(function, name, staticmethod(_in_single(method.__func__)))
    try:
        yield
    finally:
        for function, name, method in before:
            setattr(function, name, method)


def _in_single(method: Callable) -> Callable:
    @wraps(method)
    def wrapped(ctx, *args):
        leaves = tree_leaves(args)
        if not any(isinstance(a, Tensor) and a.dtype == HALF for a in leaves):
            return method(ctx, *args)
        args = _cast(args, HALF, torch.float32)
        with torch.autocast('cpu', enabled=False):
            result = method(ctx, *args)
        return _cast(result, torch.float32, HALF)

    return wrapped


def _cast(values, source: torch.dtype, target: torch.dtype):
    """Tensors of one type in another; all else as it is."""
    return tree_map_only(
        Tensor, lambda t: t.to(target) if t.dtype == source else t, values
    )
