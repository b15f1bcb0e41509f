"""A frozen backbone: neck and heads alone train."""

from torch import nn

from ...registry import MODELS
from .blocks import Block
from .method import PETLMethod


@MODELS.register_module()
class Fixed(PETLMethod):
    """Trains no parameter of the backbone; adds none."""

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> list[nn.Parameter]:
        """See :class:`PETLMethod`."""
        return []
