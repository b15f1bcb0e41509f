"""Full fine-tuning: the whole backbone trains."""

from collections.abc import Iterator

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block


@MODELS.register_module()
class Full(PETLMethod):
    """Trains all parameters of the backbone; adds none."""

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> Iterator[nn.Parameter]:
        """See :class:`PETLMethod`."""
        return stock.parameters()
