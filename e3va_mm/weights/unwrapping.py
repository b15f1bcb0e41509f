"""The tensors of a checkpoint, out of what is wrapped around them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from e3va_mm.errors import CheckpointError, E3VAError

# 'teacher' is what DINO and DINOv2 evaluate, 'module' what DeepSpeed writes.
_WRAPPERS = ('state_dict', 'model', 'teacher', 'module')


@contextmanager
def converting(source: str) -> Iterator[None]:
    """Inside, what tensors of impossible shapes fail with names the file.

    Args:
        source (str): The file.

    Raises:
        CheckpointError: Instead of errors of Python and torch.
    """
    try:
        yield
    except E3VAError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f'{source} holds tensors under known names, but of shapes or '
            f'types that no file of this kind has ({type(error).__name__}: '
            f'{str(error).splitlines()[0] if str(error) else "no more"}). '
            'Take the file as it was published.'
        ) from error


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


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take what lies under a prefix, without it; empty if there is none."""
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
