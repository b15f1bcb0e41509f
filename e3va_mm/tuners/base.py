"""What all tuners have in common.

Finding, inserting, declaring and freezing are here and in the backbone; a
tuner is a file of its own that says what to find and what to insert.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.insertion import Block, Insertion
from e3va_mm.utils.options import Options, option, optional, whole


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """A tuner without options."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions(Options):
    """Options of every tuner that adds to blocks.

    Attributes:
        last (int, optional): Adapt this many blocks, counted from the last:
            gradients travel through these alone, and nothing of those before
            is kept. Defaults to all.
    """

    last: int | None = option(None, optional(whole()))


class Tuner(nn.Module):
    """What trains in a backbone; a child of it once it is attached.

    Its own parameters all train. Which stock ones train beside them is what
    :meth:`attach` gives; all others are frozen.

    Args:
        **options: Those of ``OPTIONS``, a data class.

    Attributes:
        enabled (bool): Set it to False to get what the stock backbone gives.
            Defaults to True.

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
        self.enabled = True

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

    def upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        """Bring a state of earlier versions into the form of this one.

        Args:
            state (dict[str, Tensor]): The state; changed.
            prefix (str): That of the tuner in it.
        """

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
    """A tuner with an adapter on some branches of every block.

    Or of the last blocks, see :class:`BlockOptions`.
    """

    OPTIONS = BlockOptions

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList()

    def make(self, channels: int) -> nn.Module:
        """An adapter for a branch of so many channels."""
        raise NotImplementedError

    def insertion(self, adapter: nn.Module, last: bool) -> Insertion:
        """What an adapter adds to its branch, the last of a block or not."""
        raise NotImplementedError

    def branches(self, block: Block) -> Sequence[str]:
        """Names of the branches that have an adapter. Defaults to all."""
        return block.branches

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`Tuner`."""
        for path, module in last_blocks(trunk, self.options.last):
            block = Block(path, module, trunk)
            adapters = nn.ModuleDict(
                {
                    name: self.make(block.channels)
                    for name in self.branches(block)
                }
            )
            self.blocks.append(adapters)
            block.insert(
                {
                    name: self.insertion(each, name == block.branches[-1])
                    for name, each in adapters.items()
                }
            )
        return []


def last_blocks(
    trunk: Trunk, count: int | None, option: str = 'last'
) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the last blocks of a trunk, in order.

    Args:
        trunk (Trunk): The trunk.
        count (int, optional): How many; None for all.
        option (str): The option that says so. Defaults to ``'last'``.

    Raises:
        ConfigError: If there are not as many.
    """
    body = trunk.body()
    if count is not None and count > len(body):
        raise ConfigError(
            f'`tuner.{option}` should be a whole number from 1 to the '
            f'{len(body)} blocks of {trunk.stock_class.__name__}, but got '
            f'{count!r}.'
        )
    return body if count is None else body[-count:]


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
