"""The backbone in a file that has the stock names already."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from e3va_mm.weights.unwrapping import part_of, tensors_of


def to_stock_state(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Tensor], str]:
    """Unwrap a file with stock names.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one under
            ``state_dict`` or ``model``. It is not changed.

    Returns:
        The tensors, of a whole model only those of its backbone without
        ``backbone.``, and the format in words.
    """
    tensors = tensors_of(checkpoint)
    backbone = part_of(tensors, 'backbone.')
    return (backbone, 'MM model') if backbone else (tensors, 'MM backbone')
