"""LoRA: low-rank updates of linear layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod, check_all_found, found, several
from e3va_mm.tuners.blocks import Block
from e3va_mm.tuners.bottleneck import check_width
from e3va_mm.utils import is_number

QKV = ('q', 'k', 'v')


class LowRankUpdate(nn.Module):
    """Updates of some parts of a frozen linear layer's output.

    ``y_i <- y_i + s * x A_i^T B_i^T`` (paper, Sec. 4.1). ``B`` starts at
    zero.

    Args:
        layer (nn.Linear): The layer, (C) -> (parts * C').
        parts (Sequence[int]): Which equal parts of the output.
        of (int): How many there are.
        rank (int): Inner rank ``r``.
        scale (float): ``s``, the paper's ``alpha / r``.
    """

    def __init__(
        self,
        layer: nn.Linear,
        parts: Sequence[int],
        of: int,
        rank: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.parts, self.of, self.scale = tuple(parts), of, scale
        width = layer.out_features // of
        self.down = nn.ParameterList(
            torch.empty(rank, layer.in_features) for _ in parts
        )
        self.up = nn.ParameterList(torch.zeros(width, rank) for _ in parts)
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=5**0.5)

    def forward(
        self, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor
    ) -> Tensor:
        """The forward hook of the layer."""
        width = output.shape[-1] // self.of
        for part, down, up in zip(self.parts, self.down, self.up, strict=True):
            inner = nn.functional.linear(inputs[0], down.to(inputs[0].dtype))
            added = nn.functional.linear(inner, up.to(inner.dtype))
            # In place: nothing of the frozen product is kept for backward.
            output[..., part * width :][..., :width] += self.scale * added
        return output

    @torch.no_grad()
    def merge(self, layer: nn.Linear) -> None:
        """Add the update to the layer's weight."""
        rows = layer.weight.chunk(self.of)
        for part, down, up in zip(self.parts, self.down, self.up, strict=True):
            update = self.scale * (up.double() @ down.double())
            rows[part].add_(update.to(rows[part].dtype))


@MODELS.register_module()
class LoRA(PETLMethod):
    """Low-rank updates of q and v in every block.

    `LoRA <https://arxiv.org/abs/2106.09685>`_, Sec. 4. :meth:`merge` folds
    them into the weights, for inference at no cost.

    Args:
        rank (int): Inner rank ``r``. Defaults to 64.
        alpha (float, optional): Updates are scaled by ``alpha / r``. Defaults
            to ``rank``.
        layers (Sequence[str]): Names of the linear layers, as the last part
            of their path. Defaults to ``('qkv',)``.
        parts (Sequence[str]): Which of q, k and v, of layers that are named
            ``qkv`` and give all three. Others are updated as a whole.
            Defaults to ``('q', 'v')``.

    Raises:
        ConfigError: If an argument is out of range, or a block has no such
            layer, or one that it does not call.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: float | None = None,
        layers: Sequence[str] = ('qkv',),
        parts: Sequence[str] = ('q', 'v'),
    ) -> None:
        super().__init__()
        check_width(rank, 'rank')
        alpha = rank if alpha is None else alpha
        if not is_number(alpha):
            raise ConfigError(
                f'`method.alpha` should be a number, but got {alpha!r}.'
            )
        parts = several(parts, 'parts')
        if any(part not in QKV for part in parts):
            raise ConfigError(
                f'`method.parts` should name some of {QKV}, but got {parts!r}.'
            )
        self.rank, self.scale = rank, alpha / rank
        self.names = several(layers, 'layers')
        self.parts = [QKV.index(part) for part in parts]
        self.updates = nn.ModuleList()
        self._merges: list[tuple[LowRankUpdate, list[nn.Linear], object]] = []

    def attach(self, stock: nn.Module, blocks: list[Block]) -> list:
        """See :class:`PETLMethod`."""
        missing = set(self.names)
        for block in blocks:
            layers = [
                (owner, name, child)
                for owner in block.module.modules()
                for name, child in owner.named_children()
                if name in self.names and isinstance(child, nn.Linear)
            ]
            for owner, name, layer in found(
                layers,
                block.module,
                f'linear layers named {", ".join(self.names)} '
                '(`method.layers`)',
            ):
                missing.discard(name)
                own_bias = getattr(owner, 'q_bias', None) is not None
                if isinstance(owner, nn.MultiheadAttention) or (
                    own_bias and name == 'qkv'
                ):
                    raise ConfigError(
                        'LoRA expects attention that calls its layer '
                        f'`{name}`, but {type(owner).__name__} of '
                        f'{block.path} reads the weight itself. Take another '
                        'method, or `method.layers` of the MLP.'
                    )
                parts, of = [0], 1
                if name == 'qkv':
                    parts, of = self.parts, len(QKV)
                update = LowRankUpdate(layer, parts, of, self.rank, self.scale)
                self.updates.append(update)
                handle = layer.register_forward_hook(update)
                # In a list, or the layer would be a child of this.
                self._merges.append((update, [layer], handle))
        check_all_found(missing, 'layers')
        return []

    def merge(self) -> None:
        """Fold the updates into the stock weights; nothing is added then."""
        for update, (layer,), handle in self._merges:
            update.merge(layer)
            handle.remove()
        self._merges = []
        self.updates = nn.ModuleList()
