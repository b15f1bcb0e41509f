"""Adapter of Houlsby et al., inside the blocks."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import BlockOptions, BlockTuner
from e3va_mm.tuners.bottleneck import Bottleneck
from e3va_mm.tuners.insertion import Insertion
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(BlockOptions):
    """Options of :class:`Adapter`, beside those of :class:`BlockOptions`.

    Attributes:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.
    """

    bottleneck: int = option(64, whole())


@MODELS.register_module()
class Adapter(BlockTuner):
    """Two adapters in every block, each with its own skip.

    `Parameter-efficient transfer learning for NLP
    <https://arxiv.org/abs/1902.00751>`_, Sec. 2.1. As in the published runs on
    dense prediction, the first stands behind the residual of attention, the
    second on the output of the MLP before its residual:

        ``x <- x + attn; x <- x + A_1(x); m = mlp(x); x <- x + m + A_2(m)``.

    A block with one branch has the second alone. With stochastic depth ``m``
    is what is left of it. There is no dropout in the bottleneck.

    Args:
        **options: See :class:`AdapterOptions`.
    """

    OPTIONS = AdapterOptions

    def make(self, channels: int) -> Bottleneck:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return Bottleneck(channels, self.options.bottleneck)

    def insertion(self, adapter: nn.Module, last: bool) -> Insertion:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return partial(on_branch if last else behind_residual, adapter)


def behind_residual(adapter: nn.Module, stream, branch, size) -> Tensor:
    """An ``Insertion``: what a layer behind the sum adds."""
    return adapter(stream + branch)


def on_branch(adapter: nn.Module, stream, branch, size) -> Tensor:
    """An ``Insertion``: what a layer on the branch, with a skip, adds."""
    return adapter(branch)
