"""Adapter of Houlsby et al., inside the blocks."""

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block
from e3va_mm.tuners.bottleneck import Bottleneck


@MODELS.register_module()
class Adapter(PETLMethod):
    """Two adapters in every block, each with its own skip.

    `Parameter-efficient transfer learning for NLP
    <https://arxiv.org/abs/1902.00751>`_, Sec. 2.1. As in the published runs on
    dense prediction, the first stands behind the residual of attention, the
    second on the output of the MLP before its residual:

        ``x <- x + attn; x <- x + A_1(x); m = mlp(x); x <- x + m + A_2(m)``.

    A block with one branch has the second alone. With stochastic depth ``m``
    is what is left of it. There is no dropout in the bottleneck.

    Args:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.

    Raises:
        ConfigError: If it is no whole number above zero.
    """

    def __init__(self, bottleneck: int = 64) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.blocks = nn.ModuleList()

    def attach(self, stock: nn.Module, blocks: list[Block]) -> list:
        """See :class:`PETLMethod`."""
        for block in blocks:
            adapters = self._adapt(
                block, block.branches, Bottleneck, self.bottleneck
            )
            *behind, last = block.branches
            insertions = {
                name: BehindResidual(adapters[name]) for name in behind
            }
            block.insert({**insertions, last: OnBranch(adapters[last])})
        return []


class BehindResidual:
    """Adds ``A(stream + branch)``: what a layer behind the sum adds."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter

    def __call__(self, stream, branch, size):
        """See ``Insertion``."""
        return self.adapter(stream + branch)


class OnBranch:
    """Adds ``A(branch)``: what a layer on the branch, with a skip, adds."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter

    def __call__(self, stream, branch, size):
        """See ``Insertion``."""
        return self.adapter(branch)
