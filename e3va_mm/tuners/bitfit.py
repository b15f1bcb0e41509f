"""BitFit: biases alone train."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import Tuner, require
from e3va_mm.utils.options import Options, flag, option

# What the detectors' published code trains too, as their names hold "bias".
TABLE = 'relative_position_bias_table'


@dataclass(frozen=True, kw_only=True)
class BitFitOptions(Options):
    """Options of :class:`BitFit`.

    Attributes:
        position_tables (bool): Train relative position bias tables too, as
            the code behind the published figures of dense prediction does by
            its choice of names: 31.5 % of what it trains on Swin-B. Defaults
            to False.
    """

    position_tables: bool = option(False, flag)


@MODELS.register_module()
class BitFit(Tuner):
    """Trains the biases of the backbone (`paper
    <https://arxiv.org/abs/2106.10199>`_, Sec. 2); adds nothing.

    Args:
        **options: See :class:`BitFitOptions`.

    Raises:
        ConfigError: If the backbone has no such parameter.
    """

    OPTIONS = BitFitOptions

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        found = self._biases(trunk.stock)
        return require(found, trunk.stock, 'parameters named `bias`')

    def _biases(self, stock: nn.Module) -> Iterator[nn.Parameter]:
        for name, parameter in stock.named_parameters():
            last = name.rpartition('.')[2]
            # Attention has some with names of their own, such as `q_bias`.
            table = self.options.position_tables and last == TABLE
            if last == 'bias' or last.endswith('_bias') or table:
                yield parameter
