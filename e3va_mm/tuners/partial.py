"""Partial tuning: the last blocks train."""

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block
from e3va_mm.utils import is_whole


@MODELS.register_module()
class Partial(PETLMethod):
    """Trains the last blocks of the backbone as they are; adds nothing.

    "Partial-k" of `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_,
    Sec. 4.1.

    Args:
        blocks (int): How many blocks, counted from the last. Defaults to 1.

    Raises:
        ConfigError: If the backbone has not as many.
    """

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.blocks = blocks

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> list[nn.Parameter]:
        """See :class:`PETLMethod`."""
        if not is_whole(self.blocks, 1, len(blocks)):
            raise ConfigError(
                '`method.blocks` of Partial should be a whole number from 1 '
                f'to the {len(blocks)} blocks of {type(stock).__name__}, but '
                f'got {self.blocks!r}.'
            )
        return [
            parameter
            for block in blocks[-self.blocks :]
            for parameter in block.module.parameters()
        ]
