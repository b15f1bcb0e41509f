"""Unpickle weights under one explicit list of allowed names.

A ``.pth`` file is a pickle, and unpickling can run any code. ``torch.load``
with ``weights_only=True`` runs only what is on a list; :func:`load` replaces
that list by the one below for the time of one reading.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from mmengine.utils import digit_version


class _SavedDtype:
    """Stands in for ``numpy.dtype``: numbers and strings, never objects.

    The real class must not be allowed: its ``__setstate__`` lets a file clear
    the flags of an object dtype, and an array of such a dtype takes any bytes
    of the file for pointers.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufcSU]\d+', code):
            raise UnpicklingError(
                f'a numpy array of dtype {code!r}; only numbers and strings '
                'are read'
            )
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _SavedArray:
    """Stands in for numpy's array constructor; keeps the array it built."""

    def __init__(self, *args: Any):
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        order = 'F' if fortran else 'C'
        self.array = _saved_values(shape, dtype, data, order)


class _SavedHistory:
    """Stands in for mmengine's ``HistoryBuffer``; keeps its state.

    The real ``__setstate__`` would let a file replace the statistics methods
    that all buffers of the process share.
    """

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _SavedOneCycle:
    """Stands in for ``OneCycleParamScheduler`` as the owner of a method."""


def _saved_values(
    shape: tuple, dtype: _SavedDtype, data: bytes, order: str = 'C'
) -> np.ndarray:
    array = np.ndarray(shape, dtype.numpy, data, order=order)
    if array.nbytes != len(data):
        raise UnpicklingError(
            f'a numpy array of {array.nbytes} bytes with {len(data)} bytes '
            'of data'
        )
    return array.copy(order=order)


def _saved_scalar(dtype: _SavedDtype, data: bytes) -> np.generic:
    return _saved_values((), dtype, data)[()]


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, which would take any number for a size."""
    return b''


def _saved_method(owner: Any, name: str) -> Callable | None:
    """Stands in for ``getattr``, which pickles use to name methods.

    Only two uses are known: the statistics methods of a history buffer, which
    are the class's and not the file's, and the annealing function of a
    one-cycle schedule.
    """
    if owner is _SavedHistory:
        return None
    if owner is _SavedOneCycle and name in (
        '_annealing_cos',
        '_annealing_linear',
    ):
        return getattr(OneCycleParamScheduler, name)
    raise UnpicklingError(f'GLOBAL getattr is refused for {name!r}')


# Found by trying with the checkpoints of mmengine's Runner. Every name is
# answered by a class or function of this file, so neither mmengine's nor
# numpy's own unpickling code runs.
_ALLOWED = [
    # the message hub's record of losses and learning rates ...
    (_SavedHistory, 'mmengine.logging.history_buffer.HistoryBuffer'),
    # ... which names its statistics methods by getattr(HistoryBuffer, ...)
    (_saved_method, 'builtins.getattr'),
    # ... as the state of OneCycleLR names its annealing function
    (
        _SavedOneCycle,
        'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
    ),
    # arrays and scalars (best scores, histories) under the names of numpy 1
    (_SavedArray, 'numpy.core.multiarray._reconstruct'),
    (_saved_scalar, 'numpy.core.multiarray.scalar'),
    # ... and of numpy 2
    (_SavedArray, 'numpy._core.multiarray._reconstruct'),
    (_saved_scalar, 'numpy._core.multiarray.scalar'),
    # the arguments of the four above
    (_SavedArray, 'numpy.ndarray'),
    (_SavedDtype, 'numpy.dtype'),
    # the data of an empty array: protocol 2 writes b'' as bytes()
    (_no_bytes, 'builtins.bytes'),
]


_UNFINISHED = object()
_CONTAINERS = (dict, list, tuple, _SavedArray, _SavedHistory)


def _restore(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replace what the stand-ins kept by the real objects, in place.

    Each object once, however often it is named: a small file could name the
    same list a billion times. ``done`` keeps, by identity, what has been
    replaced and by what.
    """
    if not isinstance(value, _CONTAINERS):
        return value
    if id(value) in done:
        found = done[id(value)][1]
        if found is _UNFINISHED:
            raise UnpicklingError('a container that holds itself')
        return found
    done[id(value)] = value, _UNFINISHED
    found = value
    if isinstance(value, dict):
        for key in value:
            value[key] = _restore(value[key], done)
        if hasattr(value, '__dict__'):  # that of an OrderedDict
            # An attribute of a file's making could hide a method.
            versions = vars(value).get('_metadata')
            vars(value).clear()
            if _are_versions(versions):
                value._metadata = versions
    elif isinstance(value, list):
        value[:] = [_restore(each, done) for each in value]
    elif type(value) is tuple:
        found = tuple(_restore(each, done) for each in value)
    elif isinstance(value, _SavedArray):
        found = value.array
    elif isinstance(value, _SavedHistory):
        state = _restore(value.state, done)
        found = HistoryBuffer(
            state['_log_history'], state['_count_history'], state['max_length']
        )
    done[id(value)] = value, found
    return found


def _are_versions(value: Any) -> bool:
    """Whether it is what modules keep beside a state dict."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(each, dict)
        for name, each in value.items()
    )


@contextmanager
def _only_our_list() -> Iterator[None]:
    """Allow the names of this file and no other.

    Other packages may have added to torch's list, which is global.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def load(path: Path, map_location: Any) -> Any:
    """Unpickle a file of ``torch.save``; nothing in it runs.

    Args:
        path: The file. It should be neither a TorchScript program nor a tar
            archive: old versions of torch hand those to readers that know no
            ``weights_only``.
        map_location: As for ``torch.load``.

    Returns:
        What was saved: tensors, containers, and what mmengine's training
        checkpoints hold besides. Before torch 2.6 there is no list of names:
        there only tensors and containers.

    Raises:
        Exception: If the file names anything else (``UnpicklingError``), or
            whatever a damaged file makes ``torch.load`` fail with.
    """
    # The list needs names for its entries, which torch has since 2.6.
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return torch.load(path, map_location, weights_only=True)
    with _only_our_list():
        content = torch.load(path, map_location, weights_only=True)
    return _restore(content, {})
