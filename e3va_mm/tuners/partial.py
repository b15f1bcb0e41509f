"""Partial tuning: the last blocks train."""

from dataclasses import dataclass

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import Tuner, last_blocks
from e3va_mm.utils.options import Options, option, whole


@dataclass(frozen=True, kw_only=True)
class PartialOptions(Options):
    """Options of :class:`Partial`.

    Attributes:
        blocks (int): How many blocks, counted from the last. Defaults to 1.
    """

    blocks: int = option(1, whole())


@MODELS.register_module()
class Partial(Tuner):
    """Trains the last blocks of the backbone as they are; adds nothing.

    "Partial-k" of `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_,
    Sec. 4.1.

    Args:
        **options: See :class:`PartialOptions`.

    Raises:
        ConfigError: If the backbone has not as many blocks.
    """

    OPTIONS = PartialOptions

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        blocks = last_blocks(trunk, self.options.blocks, 'blocks')
        return [p for _, block in blocks for p in block.parameters()]
