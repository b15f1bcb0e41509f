"""Types of products, and autocast on whatever device a tensor is."""

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
    on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def autocast_to(like: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a type, None for off, on the device of a tensor."""
    return torch.autocast(like.device.type, dtype, enabled=dtype is not None)


def autocast_off(like: Tensor) -> torch.autocast:
    """Inside, every tensor has the type it is given."""
    return torch.autocast(like.device.type, enabled=False)
