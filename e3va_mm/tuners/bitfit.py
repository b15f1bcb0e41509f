"""BitFit: biases alone train."""

from collections.abc import Iterator

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod, found
from e3va_mm.tuners.blocks import Block

# What the detectors' published code trains too, as their names hold "bias".
TABLE = 'relative_position_bias_table'


@MODELS.register_module()
class BitFit(PETLMethod):
    """Trains the biases of the backbone (`paper
    <https://arxiv.org/abs/2106.10199>`_, Sec. 2); adds nothing.

    Args:
        position_tables (bool): Train relative position bias tables too, as
            the code behind the published figures of dense prediction does by
            its choice of names: 31.5 % of what it trains on Swin-B. Defaults
            to False.

    Raises:
        ConfigError: If the backbone has no such parameter, or
            ``position_tables`` is neither True nor False.
    """

    def __init__(self, position_tables: bool = False) -> None:
        super().__init__()
        if not isinstance(position_tables, bool):
            raise ConfigError(
                '`method.position_tables` should be True or False, but got '
                f'{position_tables!r}.'
            )
        self.position_tables = position_tables

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> list[nn.Parameter]:
        """See :class:`PETLMethod`."""
        return found(self._chosen(stock), stock, 'parameters named `bias`')

    def _chosen(self, stock: nn.Module) -> Iterator[nn.Parameter]:
        for name, parameter in stock.named_parameters():
            last = name.rpartition('.')[2]
            # Attention has some with names of their own, such as `q_bias`.
            table = self.position_tables and last == TABLE
            if last == 'bias' or last.endswith('_bias') or table:
                yield parameter
