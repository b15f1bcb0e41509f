"""Full fine-tuning: the whole backbone trains."""

from collections.abc import Iterator

from torch import nn

from ...registry import MODELS
from .blocks import Block
from .method import PETLMethod


@MODELS.register_module()
class Full(PETLMethod):
    """Trains all parameters of the backbone; adds none."""

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> Iterator[nn.Parameter]:
        """See :class:`PETLMethod`."""
        return stock.parameters()
