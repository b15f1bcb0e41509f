"""Inserting computations into the blocks of a stock backbone.

A block adds branches to a stream: ``x <- x + branch(x)``. Something inserted
reads the stream before a branch, and what the branch gives, and adds to it.
The stock modules, their names and their forward code stay: forward hooks do
it, which activation checkpointing runs again as it runs the block again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.autograd import in_backward
from e3va_mm.trunks import Size, Trunk
from e3va_mm.trunks.layout import find, length_of
from e3va_mm.trunks.trunk import grid_of

# What is inserted: (stream, branch), both (..., C), and a function that finds
# the grid of the image's tokens -> what is added to the branch, (..., C). All
# but the last ``H * W`` tokens of (B, L, C) are no part of the grid.
Insertion = Callable[[Tensor, Tensor, Callable[[], Size]], Tensor]


class Block:
    """A block of a stock backbone, and what is inserted into it.

    Args:
        path (str): Where it is, as in the state dict.
        module (nn.Module): The stock block.
        trunk (Trunk): Whose block it is.

    Attributes:
        channels (int): Channels ``C`` of its stream.
        branches (tuple[str, ...]): Names of its branches, in order.
    """

    def __init__(self, path: str, module: nn.Module, trunk: Trunk) -> None:
        self.path = path
        self.module = module
        self.trunk = trunk
        self.layout = trunk.layout
        self.channels = length_of(find(module, self.layout.channels))
        self.branches = tuple(self.layout.taps)
        self._inputs: tuple = ()
        self._inserted: dict[str, Insertion] = {}
        self._stream: Tensor | None = None
        self._calls: dict[str, int] = {}
        self._sizes: dict[torch.Size, Size] = {}
        # What was trained on since a checkpoint last ran the block again.
        self._seen: set[tuple[torch.Size, Size]] = set()
        self._ran_again = False
        self._handles: list = []

    def insert(self, insertions: Mapping[str, Insertion]) -> None:
        """Add to branches, by their names.

        Raises:
            ConfigError: If blocks change the width of their stream.
        """
        if self.layout.stage_ends is not None:
            raise ConfigError(
                'Expected blocks that keep the width of their stream, but a '
                f'stage of {self.trunk.stock_class.__name__} begins within '
                'one. Take a tuner that inserts nothing into blocks, such as '
                'E3VA, LoRA or BitFit.'
            )
        self._inserted.update(insertions)
        if self._handles:
            return
        first = find(self.module, self.layout.first or self.layout.channels)
        paths = {tap.partition('#')[0] for tap in self.layout.taps.values()}
        self._handles = [
            self.module.register_forward_pre_hook(self._enter),
            first.register_forward_pre_hook(self._begin),
            # A deep copy of the backbone gets hooks of its own.
            *(
                find(self.module, path).register_forward_hook(
                    _BranchHook(self, path)
                )
                for path in sorted(paths)
            ),
            *(
                find(self.module, path).register_forward_pre_hook(self._read)
                for path in self.layout.reads
            ),
        ]

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        self._inputs = tuple(x for x in inputs if not isinstance(x, Tensor))

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        """A run of the block begins; a checkpoint runs it twice."""
        self._stream = self._tokens(inputs[0])
        self._calls = {}

    def _read(self, module: nn.Module, inputs: tuple) -> None:
        """The block's own sum, so that no second one is kept."""
        self._stream = self._tokens(inputs[0])

    def branch(self, path: str, output: Tensor) -> Tensor:
        """What a branch gave, with what is inserted there."""
        self._calls[path] = call = self._calls.get(path, 0) + 1
        name = self._name(path, call)
        if name is None:
            return output
        value = self._tokens(output)
        if (
            len(self._stream) != len(value)
            or self._stream.numel() != value.numel()
        ):
            raise ConfigError(
                f'Expected the branch {name!r} of {self.path} to give tokens '
                f'as they lie in its stream, {tuple(self._stream.shape)}, but '
                f'got {tuple(value.shape)}: it works on windows. Take a '
                'tuner that leaves it alone, such as LoRA or BitFit.'
            )
        stream = self._stream.reshape(value.shape)
        insertion = self._inserted.get(name)
        if insertion is not None:
            size = partial(self._size, value)
            value = value + insertion(stream, value, size)
        # The last branch of a block has no one to read its sum; the block's
        # own is read where it is known who reads it.
        last = name == self.branches[-1]
        own = len(self.layout.reads) == len(self.branches) - 1
        self._stream = None if last or own else stream + value
        return self._as(value, output)

    def _size(self, value: Tensor) -> Size:
        """The grid of tokens; of those run again, what it was before."""
        shape = value.shape
        if in_backward():
            self._ran_again = True
            if sum(seen == shape for seen, _ in self._seen) > 1:
                raise ConfigError(
                    'Expected tokens of one grid in the forwards before a '
                    f'backward, but {self.path} got two of {shape[1]} tokens, '
                    'and activation checkpoints cannot tell which to run '
                    'again. Pad images to one size, or set `with_cp=False`.'
                )
            return self._sizes[shape]
        if self._ran_again:
            self._seen, self._ran_again = set(), False
        size = grid_of(
            self._inputs, value, self.trunk.extra_tokens, self.trunk.pixels
        )
        self._sizes[shape] = size
        if self.module.training:
            self._seen.add((shape, size))
        return size

    def _name(self, path: str, call: int) -> str | None:
        for name, tap in self.layout.taps.items():
            where, _, number = tap.partition('#')
            if where == path and int(number or 1) == call:
                return name
        return None

    def _tokens(self, value: Tensor) -> Tensor:
        """Channels last."""
        if value.ndim == 4 and not self.layout.channels_last:
            return value.permute(0, 2, 3, 1)
        return value

    def _as(self, value: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 4 and not self.layout.channels_last:
            return value.permute(0, 3, 1, 2)
        return value


class _BranchHook(NamedTuple):
    """The forward hook of a module whose output is a branch."""

    block: Block
    path: str

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor):
        return self.block.branch(self.path, output)
