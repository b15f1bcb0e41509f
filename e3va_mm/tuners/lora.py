"""LoRA: low-rank updates of linear layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import (
    BlockOptions,
    Tuner,
    last_blocks,
    require,
    require_all_found,
)
from e3va_mm.utils.options import (
    Check,
    names,
    number,
    option,
    optional,
    whole,
)

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


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(BlockOptions):
    """Options of :class:`LoRA`, beside those of :class:`BlockOptions`.

    Attributes:
        rank (int): Inner rank ``r``. Defaults to 64.
        alpha (float, optional): Updates are scaled by ``alpha / r``. Defaults
            to ``rank``.
        layers (Sequence[str]): Names of the linear layers, as the last part
            of their path. Defaults to ``('qkv',)``.
        parts (Sequence[str]): Which of q, k and v, of layers that are named
            ``qkv`` and give all three. Others are updated as a whole.
            Defaults to ``('q', 'v')``.
    """

    rank: int = option(64, whole())
    alpha: float | None = option(None, optional(number()))
    layers: Sequence[str] = option(('qkv',), names)
    parts: Sequence[str] = option(
        ('q', 'v'),
        Check(
            lambda value: names.fits(value) and all(p in QKV for p in value),
            f'a list of some of {QKV}',
        ),
    )


@MODELS.register_module()
class LoRA(Tuner):
    """Low-rank updates of q and v in every block.

    `LoRA <https://arxiv.org/abs/2106.09685>`_, Sec. 4. :meth:`merge` folds
    them into the weights, for inference at no cost.

    Args:
        **options: See :class:`LoRAOptions`.

    Raises:
        ConfigError: If a block has no such layer, or one that it does not
            call.
    """

    OPTIONS = LoRAOptions

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.updates = nn.ModuleList()
        self._merges: list[tuple[LowRankUpdate, list[nn.Linear], object]] = []

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        wanted, rank = self.options.layers, self.options.rank
        alpha = rank if self.options.alpha is None else self.options.alpha
        missing = set(wanted)
        for path, block in last_blocks(trunk, self.options.last):
            layers = (
                (owner, name, child)
                for owner in block.modules()
                for name, child in owner.named_children()
                if name in wanted and isinstance(child, nn.Linear)
            )
            for owner, name, layer in require(
                layers,
                block,
                f'linear layers named {", ".join(wanted)} (`tuner.layers`)',
            ):
                missing.discard(name)
                own_bias = getattr(owner, 'q_bias', None) is not None
                if isinstance(owner, nn.MultiheadAttention) or (
                    own_bias and name == 'qkv'
                ):
                    raise ConfigError(
                        'LoRA expects attention that calls its layer '
                        f'`{name}`, but {type(owner).__name__} of {path} '
                        'reads the weight itself. Take another tuner, or '
                        '`tuner.layers` of the MLP.'
                    )
                parts, of = [0], 1
                if name == 'qkv':
                    parts = [QKV.index(part) for part in self.options.parts]
                    of = len(QKV)
                update = LowRankUpdate(layer, parts, of, rank, alpha / rank)
                self.updates.append(update)
                handle = layer.register_forward_hook(update)
                # In a list, or the layer would be a child of this.
                self._merges.append((update, [layer], handle))
        require_all_found(missing, 'layers')
        return []

    def merge(self) -> None:
        """Fold the updates into the stock weights; nothing is added then."""
        for update, (layer,), handle in self._merges:
            update.merge(layer)
            handle.remove()
        self._merges = []
        self.updates = nn.ModuleList()
