"""Digests of tensors, by which weights are recognised."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, however these are stored.

    Args:
        tensors (Mapping[str, Tensor]): The weights; floating-point values
            count in single precision.
    """
    digest = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        wide = torch.float32 if value.is_floating_point() else torch.int64
        _add(digest, name, value.to(wide))
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 over the bytes of tensors, and over texts beside them."""
    digest = sha256(json.dumps(sorted(texts.items())).encode())
    for name in sorted(tensors):
        _add(digest, f'{name} {tensors[name].dtype}', tensors[name].cpu())
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f'{name} {tuple(value.shape)}\n'.encode())
    digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
