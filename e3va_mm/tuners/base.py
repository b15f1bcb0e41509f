"""What all tuners have in common.

Finding, inserting, declaring and freezing are here and in the backbone; a
tuner is a file of its own that says what to find and what to insert.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.blocks import Block
from e3va_mm.utils.options import Options


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """A tuner without options."""


class Tuner(nn.Module):
    """What trains in a backbone; a child of it once it is attached.

    Its own parameters all train. Which stock ones train beside them is what
    :meth:`attach` gives; all others are frozen.

    Args:
        **options: Those of ``OPTIONS``, a data class.

    Raises:
        ConfigError: If an option is unknown or out of range.
    """

    # Name of the child in the backbone, and in state dicts.
    CHILD: ClassVar[str] = 'petl'
    # Whether gradients travel through the stock blocks.
    HAS_GRAPH: ClassVar[bool] = True
    OPTIONS: ClassVar[type[Options]] = NoOptions

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = self.OPTIONS.of(options)

    def attach(self, trunk: Trunk) -> Iterable[nn.Parameter]:
        """Insert what the tuner adds.

        Args:
            trunk (Trunk): The stock backbone and its blocks.

        Returns:
            Iterable[nn.Parameter]: The stock parameters that train.

        Raises:
            ConfigError: If what the tuner looks for is not there.
        """
        raise NotImplementedError

    def merge(self) -> None:
        """Fold what was learned into the stock weights.

        Without parameters of its own, a tuner has it there already.

        Raises:
            ConfigError: If the tuner has a computation of its own that no
                stock weight can hold.
        """
        if any(True for _ in self.parameters()):
            raise ConfigError(
                f'{type(self).__name__} adds computations that no weight of '
                'the stock backbone can hold, so that it cannot be merged. '
                'LoRA can.'
            )


class BlockTuner(Tuner):
    """A tuner with adapters on the branches of every block."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList()

    def add_adapters(
        self,
        block: Block,
        branches: Sequence[str],
        make: Callable[[int], nn.Module],
    ) -> nn.ModuleDict:
        """Make an adapter for each of some branches of a block.

        Args:
            block (Block): The block.
            branches (Sequence[str]): Names of its branches.
            make (Callable): Channels -> adapter.
        """
        adapters = nn.ModuleDict(
            {name: make(block.channels) for name in branches}
        )
        self.blocks.append(adapters)
        return adapters


def require(things: Iterable, owner: nn.Module, what: str) -> list:
    """The things as a list, or an error where there are none.

    Args:
        things (Iterable): What a tuner has found.
        owner (nn.Module): Where it has looked.
        what (str): What it has looked for, in words.

    Raises:
        ConfigError: If nothing was found.
    """
    things = list(things)
    if not things:
        raise ConfigError(
            f'Expected {what} in {type(owner).__name__}, but there is none. '
            'Take another tuner for this backbone, or another pattern.'
        )
    return things


def require_all_found(missing: set[str], option: str) -> None:
    """Refuse names of an option that no block has.

    Raises:
        ConfigError: If there are any.
    """
    if missing:
        raise ConfigError(
            f'`tuner.{option}` names {", ".join(sorted(missing))}, but no '
            'block has that. Correct it, or leave it out.'
        )
