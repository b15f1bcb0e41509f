"""Random numbers of several runs in one process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Draws:
    """The generators of torch, numpy and Python, as one run sees them.

    Begins where the generators of the process are now.
    """

    def __init__(self) -> None:
        self._states = _states()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from here on and not from the generators of the process."""
        outside = _states()
        _set(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set(outside)


def _states() -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def _set(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
