"""The tensors of a checkpoint, out of what is wrapped around them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# 'teacher' is what DINO and DINOv2 evaluate, 'module' what DeepSpeed writes.
_WRAPPERS = ('state_dict', 'model', 'teacher', 'module')


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a checkpoint; drop ``module.`` and what is no tensor."""
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
    return {
        key.removeprefix('module.'): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take what lies under a prefix, without it; empty if there is none."""
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
