"""The tensors of a checkpoint, out of what is wrapped around them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from e3va_mm.errors import CheckpointError, E3VAError
from e3va_mm.weights.hub_names import from_transformers

# 'teacher' is what DINO and DINOv2 evaluate, 'module' what DeepSpeed writes,
# 'model_state' Hiera's files have.
_WRAPPERS = ('state_dict', 'model', 'model_state', 'teacher', 'module')


def state_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict within a checkpoint, which may be one itself."""
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
    return content


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a checkpoint; drop ``module.`` and what is no tensor."""
    return {
        key.removeprefix('module.'): value
        for key, value in state_of(content).items()
        if isinstance(value, Tensor)
    }


def part_of(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Take what lies under a prefix, without it; empty if there is none."""
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }


def to_stock_state(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Tensor], str]:
    """Unwrap a file with stock names, or with those of transformers.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one under
            ``state_dict`` or ``model``. It is not changed.

    Returns:
        The tensors, of a whole model only those of its backbone without
        ``backbone.``, and the format in words. Those of transformers come
        with their official names.
    """
    tensors = tensors_of(checkpoint)
    backbone = part_of(tensors, 'backbone.')
    form = 'MM model' if backbone else 'MM backbone'
    state, family = from_transformers(backbone or tensors)
    return state, f'transformers {family}' if family else form


@contextmanager
def converting(source: str) -> Iterator[None]:
    """Inside, tensors of impossible shapes raise an error with the file.

    Args:
        source (str): The file.

    Raises:
        CheckpointError: Instead of errors of Python and torch.
    """
    try:
        yield
    except E3VAError:
        raise
    except Exception as error:
        raise CheckpointError(
            f'{source} holds tensors under known names, but of shapes or '
            f'types that no file of this kind has ({type(error).__name__}: '
            f'{str(error).partition(chr(10))[0] or "no more"}). '
            'Take the file as it was published.'
        ) from error
