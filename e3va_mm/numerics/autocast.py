"""Types of products, and autocast on whatever device a tensor is."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = {
    'fp32': torch.float32,
    'bf16': torch.bfloat16,
    'fp16': torch.float16,
}


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """Autocast's type on the device of a tensor, None where it is off."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return None
    on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def autocast_to(
    like: Tensor, dtype: torch.dtype | None
) -> AbstractContextManager:
    """Autocast to a type, None for off, on the device of a tensor.

    On a device that has no autocast it is off.
    """
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def autocast_off(like: Tensor) -> AbstractContextManager:
    """Inside, every tensor has the type it is given."""
    return autocast_to(like, None)
