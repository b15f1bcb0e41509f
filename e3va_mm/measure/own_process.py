"""Measuring in a process of its own, whose memory nothing else has used."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from e3va_mm.errors import E3VAError


def in_own_process(
    function: Callable,
    *args: Any,
    killed: str,
    prepare: Callable[[], None] | None = None,
) -> Any:
    """What a function returns, called in a new process.

    Args:
        function (Callable): The function, like its arguments picklable.
        *args: Its arguments.
        killed (str): What to say if the process is killed.
        prepare (Callable, optional): Called first in the process; picklable.

    Raises:
        E3VAError: If the process was killed.
        Exception: What the function raises.
    """
    with ProcessPoolExecutor(1, get_context('spawn'), prepare) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise E3VAError(killed) from None
