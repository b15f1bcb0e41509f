"""AdaptFormer: adapters beside the branches."""

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod, check_all_found, found, several
from e3va_mm.tuners.blocks import Block
from e3va_mm.tuners.bottleneck import Bottleneck
from e3va_mm.utils import is_number


@MODELS.register_module()
class AdaptFormer(PETLMethod):
    """An adapter parallel to a branch and its norm, scaled.

    `AdaptFormer <https://arxiv.org/abs/2205.13535>`_, Sec. 3.2:

        ``x <- x + mlp(norm(x)) + s * A(x)``.

    With GELU, as the published runs on dense prediction; no dropout.

    Args:
        bottleneck (int): Channels of the bottleneck. Defaults to 64.
        scale (float): ``s``. Defaults to 0.1.
        branches (Sequence[str], optional): Which branches have one. The paper
            has the MLP's alone, the authors' runs on dense prediction too
            (2.33 M on Swin-L); the published counts (4.66 M) are those of
            both. Defaults to all.

    Raises:
        ConfigError: If an argument is out of range, or the backbone has no
            such branch.
    """

    def __init__(
        self,
        bottleneck: int = 64,
        scale: float = 0.1,
        branches: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if not is_number(scale):
            raise ConfigError(
                f'`method.scale` should be a number, but got {scale!r}.'
            )
        self.bottleneck = bottleneck
        self.scale = scale
        self.branches = None
        if branches is not None:
            self.branches = several(branches, 'branches')
        self.blocks = nn.ModuleList()

    def attach(self, stock: nn.Module, blocks: list[Block]) -> list:
        """See :class:`PETLMethod`."""
        missing = set(self.branches or ())
        for block in blocks:
            names = found(
                (
                    name
                    for name in block.branches
                    if self.branches is None or name in self.branches
                ),
                block.module,
                f'a branch named by `method.branches` {self.branches} (it has '
                f'{", ".join(block.branches)})',
            )
            missing.difference_update(names)
            adapters = self._adapt(block, names, Bottleneck, self.bottleneck)
            block.insert(
                {
                    name: Beside(adapter, self.scale)
                    for name, adapter in adapters.items()
                }
            )
        check_all_found(missing, 'branches')
        return []


class Beside:
    """Adds ``s * A(stream)``."""

    def __init__(self, adapter: nn.Module, scale: float) -> None:
        self.adapter = adapter
        self.scale = scale

    def __call__(self, stream, branch, size):
        """See ``Insertion``."""
        return self.scale * self.adapter(stream)
