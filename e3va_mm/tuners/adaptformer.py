"""AdaptFormer: adapters beside the branches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import (
    BlockOptions,
    BlockTuner,
    require,
    require_all_found,
)
from e3va_mm.tuners.bottleneck import Bottleneck
from e3va_mm.tuners.insertion import Block, Insertion
from e3va_mm.utils.options import (
    names,
    number,
    option,
    optional,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class AdaptFormerOptions(BlockOptions):
    """Options of :class:`AdaptFormer`, beside those of :class:`BlockOptions`.

    Attributes:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.
        scale (float): ``s``. Defaults to 0.1.
        branches (Sequence[str], optional): Which branches have one. The paper
            has the MLP's alone, the authors' runs on dense prediction too
            (2.33 M on Swin-L); the published counts (4.66 M) are those of
            both. Defaults to all.
    """

    bottleneck: int = option(64, whole())
    scale: float = option(0.1, number())
    branches: Sequence[str] | None = option(None, optional(names))


@MODELS.register_module()
class AdaptFormer(BlockTuner):
    """An adapter parallel to a branch and its norm, scaled.

    `AdaptFormer <https://arxiv.org/abs/2205.13535>`_, Sec. 3.2:

        ``x <- x + mlp(norm(x)) + s * A(x)``.

    With GELU, as the published runs on dense prediction; no dropout.

    Args:
        **options: See :class:`AdaptFormerOptions`.

    Raises:
        ConfigError: If the backbone has no such branch.
    """

    OPTIONS = AdaptFormerOptions

    def make(self, channels: int) -> Bottleneck:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return Bottleneck(channels, self.options.bottleneck)

    def insertion(self, adapter: nn.Module, last: bool) -> Insertion:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        return partial(beside, adapter, self.options.scale)

    def branches(self, block: Block) -> list[str]:
        """See :class:`~e3va_mm.tuners.base.BlockTuner`."""
        wanted = self.options.branches
        return require(
            (b for b in block.branches if wanted is None or b in wanted),
            block.module,
            f'a branch named by `tuner.branches` {wanted} (it has '
            f'{", ".join(block.branches)})',
        )

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        super().attach(trunk)
        found = {name for adapters in self.blocks for name in adapters}
        require_all_found(set(self.options.branches or ()) - found, 'branches')
        return []


def beside(adapter: nn.Module, scale: float, stream, branch, size) -> Tensor:
    """An ``Insertion``: ``s * A(stream)``."""
    return scale * adapter(stream)
