"""A frozen backbone: neck and heads alone train."""

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block


@MODELS.register_module()
class Fixed(PETLMethod):
    """Trains no parameter of the backbone; adds none."""

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> list[nn.Parameter]:
        """See :class:`PETLMethod`."""
        return []
