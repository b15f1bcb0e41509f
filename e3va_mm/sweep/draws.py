"""Random numbers of several runs in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from e3va_mm.engine.seeds import generator_states, set_generators


class Draws:
    """The generators of torch, numpy and Python, as one run sees them.

    Begins where the generators of the process are now.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._states = generator_states(self._cuda)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from here on and not from the generators of the process."""
        outside = generator_states(self._cuda)
        set_generators(self._states)
        try:
            yield
        finally:
            self._states = generator_states(self._cuda)
            set_generators(outside)
