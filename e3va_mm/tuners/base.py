"""What every tuning method inside a backbone has in common.

Finding, inserting, declaring and freezing are here; a method is a file of its
own that says what to find and what to insert.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.tuners.blocks import Block


class PETLMethod(nn.Module):
    """Tunes a stock backbone; the child ``petl`` of a ``PETLBackbone``.

    Its own parameters all train. Which stock ones train beside them is what
    :meth:`attach` gives; all others are frozen.
    """

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> Iterable[nn.Parameter]:
        """Insert what the method adds.

        Args:
            stock (nn.Module): The stock backbone.
            blocks (list[Block]): Its blocks, in order.

        Returns:
            Iterable[nn.Parameter]: The stock parameters that train.

        Raises:
            ConfigError: If what the method looks for is not there.
        """
        raise NotImplementedError

    def merge(self) -> None:
        """Fold what was learned into the stock weights.

        Without parameters of its own, a method has it there already.

        Raises:
            ConfigError: If the method has a computation of its own that no
                stock weight can hold.
        """
        if any(True for _ in self.parameters()):
            raise ConfigError(
                f'{type(self).__name__} adds computations that no weight of '
                'the stock backbone can hold, so that it cannot be merged. '
                'LoRA can.'
            )

    def _adapt(
        self,
        block: Block,
        branches: Sequence[str],
        kind: Callable[..., nn.Module],
        *options,
    ) -> nn.ModuleDict:
        """Make an adapter for branches of a block, a child of ``blocks``."""
        adapters = nn.ModuleDict(
            {name: kind(block.channels, *options) for name in branches}
        )
        self.blocks.append(adapters)
        return adapters


def found(things: Iterable, owner: nn.Module, what: str) -> list:
    """The things as a list, or an error where there are none.

    Args:
        things (Iterable): What a method has found.
        owner (nn.Module): Where it has looked.
        what (str): What it has looked for, in words.

    Raises:
        ConfigError: If nothing was found.
    """
    things = list(things)
    if not things:
        raise ConfigError(
            f'Expected {what} in {type(owner).__name__}, but there is none. '
            'Take another method for this backbone, or another pattern.'
        )
    return things


def several(names: object, option: str) -> tuple[str, ...]:
    """Names that an option of a method lists.

    Raises:
        ConfigError: If it is no list of names, or an empty one.
    """
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(
            f'`method.{option}` should be a list of names, but got {names!r}.'
        )
    return tuple(names)


def check_all_found(missing: set[str], option: str) -> None:
    """Raise if a name of an option was found in no block.

    Raises:
        ConfigError: If there are any.
    """
    if missing:
        raise ConfigError(
            f'`method.{option}` names {", ".join(sorted(missing))}, but no '
            'block has that. Correct it, or leave it out.'
        )
