"""Unpickle weights under one explicit list of allowed names.

A ``.pth`` file is a pickle, and unpickling can run any code. ``torch.load``
with ``weights_only=True`` runs only what is on a list; :func:`load` replaces
that list by the one below for the time of one reading. Every name on it is
answered by a class or function of this file, so neither mmengine's nor numpy's
own unpickling code runs.
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler


class _Dtype:
    """Stands in for ``numpy.dtype``: numbers and strings, never objects.

    The real ``__setstate__`` lets a file clear the flags of an object dtype,
    and an array of such a dtype takes any bytes of the file for pointers.
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


class _Array:
    """Stands in for numpy's array constructor; keeps the array it built."""

    def __init__(self, *args: Any):
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _values(shape, dtype, data, 'F' if fortran else 'C')


class _History:
    """Stands in for mmengine's ``HistoryBuffer``; keeps its state.

    The real ``__setstate__`` would let a file replace the statistics methods
    that all buffers of the process share.
    """

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _OneCycle:
    """Stands in for ``OneCycleParamScheduler`` as the owner of a method."""


def _values(
    shape: tuple, dtype: _Dtype, data: bytes, order: str = 'C'
) -> np.ndarray:
    array = np.ndarray(shape, dtype.numpy, data, order=order)
    if array.nbytes != len(data):
        raise UnpicklingError('a numpy array with data of another size')
    return array.copy(order=order)


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return _values((), dtype, data)[()]


def _method(owner: Any, name: str) -> Callable | None:
    """Stands in for ``getattr``, by which pickles name methods."""
    if owner is _History:  # its statistics are the class's, not the file's
        return None
    if owner is _OneCycle and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(OneCycleParamScheduler, name)
    raise UnpicklingError(f'GLOBAL getattr is refused for {name!r}')


def _empty_bytes() -> bytes:
    """Stands in for ``bytes``, which would take any number for a size."""
    return b''  # protocol 2 writes it as bytes()


_SCHEDULER = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'
# Found by trying with the checkpoints of mmengine's Runner.
_ALLOWED = [
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_OneCycle, _SCHEDULER),
    (_method, 'builtins.getattr'),
    (_empty_bytes, 'builtins.bytes'),
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    # the names of numpy 1 and of numpy 2
    (_Array, 'numpy.core.multiarray._reconstruct'),
    (_Array, 'numpy._core.multiarray._reconstruct'),
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
]


_LOCK = threading.Lock()


def load(path: Path, map_location: Any) -> Any:
    """Unpickle a file of ``torch.save``; nothing in it runs.

    Args:
        path: The file.
        map_location: As for ``torch.load``.

    Returns:
        What was saved: tensors, containers, and what mmengine's training
        checkpoints hold besides.

    Raises:
        Exception: If the file names anything else (``UnpicklingError``), or
            whatever a damaged file makes ``torch.load`` fail with.
    """
    with _LOCK:  # torch's list is global
        # Other packages may have added to it.
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(_ALLOWED):
                content = torch.load(path, map_location, weights_only=True)
        finally:
            torch.serialization.add_safe_globals(others)
    return _restore(content, {})


_UNFINISHED = object()


def _restore(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replace what the stand-ins kept by the real objects, in place.

    Each object once, however often it is named: a small file could name the
    same list a billion times. ``done`` keeps, by identity, what has been
    replaced and by what.
    """
    if not isinstance(value, (dict, list, tuple, _Array, _History)):
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
        _keep_versions(value)
    elif isinstance(value, list):
        value[:] = [_restore(each, done) for each in value]
    elif type(value) is tuple:
        found = tuple(_restore(each, done) for each in value)
    elif isinstance(value, _Array):
        found = value.array
    elif isinstance(value, _History):
        names = ('_log_history', '_count_history', 'max_length')
        state = _restore(value.state, done)
        found = HistoryBuffer(*(state[name] for name in names))
    done[id(value)] = value, found
    return found


def _keep_versions(value: dict) -> None:
    """Drop attributes of an OrderedDict, by which a file could hide a method.

    But for what modules keep beside a state dict.
    """
    attributes = getattr(value, '__dict__', {})
    versions = attributes.get('_metadata')
    attributes.clear()
    if isinstance(versions, dict) and all(
        isinstance(name, str) and isinstance(each, dict)
        for name, each in versions.items()
    ):
        value._metadata = versions
