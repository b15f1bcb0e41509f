"""LoRA (`paper <https://arxiv.org/abs/2106.09685>`_), to compare with.

For measuring beside a side path: no dropout, no merging, no state dict of its
own.
"""

from torch import Tensor, nn

from ..errors import ConfigError
from ..utils import mark_trainable

RANK = 64


class LoRAQKV(nn.Module):
    """A frozen projection to q, k, v with low-rank updates of q and v.

    ``q = x W_q^T + x A_q^T B_q^T`` and the same for ``v`` (paper Sec. 4.1,
    with ``alpha = r``). ``B`` starts at zero, so the layer begins as the
    stock one.

    Args:
        qkv (nn.Linear): (C) -> (3 C): q, k and v one after the other.
        rank (int): Inner rank ``r``. Defaults to 64.

    Raises:
        ConfigError: If the layer does not give three equal parts.
    """

    def __init__(self, qkv: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        width, remainder = divmod(qkv.out_features, 3)
        if remainder:
            raise ConfigError(
                'LoRA expects a layer that gives q, k and v of one width, but '
                f'got {qkv.out_features} channels in all.'
            )
        self.qkv = qkv
        self.down_q, self.down_v = (
            nn.Linear(qkv.in_features, rank, bias=False) for _ in range(2)
        )
        self.up_q, self.up_v = (
            nn.Linear(rank, width, bias=False) for _ in range(2)
        )
        nn.init.zeros_(self.up_q.weight)
        nn.init.zeros_(self.up_v.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        out = self.qkv(x)
        width = self.up_q.out_features
        # In place: nothing of the frozen product is kept for backward.
        out[..., :width] += self.up_q(self.down_q(x))
        out[..., 2 * width :] += self.up_v(self.down_v(x))
        return out


def add_lora(module: nn.Module, rank: int = RANK) -> None:
    """Freeze a module and put LoRA on all its linear layers named ``qkv``.

    Args:
        module (nn.Module): Changed in place.
        rank (int): See :class:`LoRAQKV`. Defaults to 64.

    Raises:
        ConfigError: If it has no such layer, or one that is not called.
    """
    found = [
        (parent, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if name == 'qkv' and isinstance(child, nn.Linear)
    ]
    if not found:
        raise ConfigError(
            'LoRA expects attention with a linear layer named `qkv`, but '
            f'{type(module).__name__} has none.'
        )
    reading = [p for p, _ in found if getattr(p, 'q_bias', None) is not None]
    if reading:
        raise ConfigError(
            'LoRA expects attention that calls its layer `qkv`, but '
            f'{type(reading[0]).__name__} reads the weight itself and adds '
            'biases of its own. Leave the variant out.'
        )
    added = []
    for parent, qkv in found:
        layer = LoRAQKV(qkv, rank).to(qkv.weight)
        parent.qkv = layer
        added += [layer.down_q, layer.up_q, layer.down_v, layer.up_v]
    mark_trainable(module, added)
