"""Other values in place of some of a module's own, for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other parameters and buffers.

    Its own are not changed; others that hold them do not see it.

    Args:
        module (nn.Module): The module.
        values (Mapping[str, Tensor]): What to take instead, by its name in
            the state dict.
    """
    before = []
    for path, value in values.items():
        owner, _, name = path.rpartition('.')
        owner = module.get_submodule(owner)
        held = owner._parameters if name in owner._parameters else None
        held = owner._buffers if held is None else held
        before.append((held, name, held[name]))
        held[name] = value
    try:
        yield
    finally:
        # A module may be there by several names.
        for held, name, value in reversed(before):
            held[name] = value
