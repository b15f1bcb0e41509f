"""Matrix products in 16 bits, also where a CPU has no instructions for it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What says whether the CPU's own products are fast.
_SUPPORTED = {
    torch.bfloat16: '_is_mkldnn_bf16_supported',
    torch.float16: '_is_mkldnn_fp16_supported',
}


def _emulated() -> set[torch.dtype]:
    found = set()
    for dtype, name in _SUPPORTED.items():
        supported = getattr(torch.ops.mkldnn, name, None)
        if supported is not None and not supported():
            found.add(dtype)
    return found


# Types whose products torch computes by scalar code on this CPU.
EMULATED = _emulated()


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or single precision where its products are emulated."""
    if device.type == 'cpu' and dtype in EMULATED:
        return torch.float32
    return dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., C) -> (..., C') in the type of ``x``.

    Products in 16 bits sum in single precision and round once. Where a CPU
    has no instructions for them, single precision from the start gives the
    same several times as fast.
    """
    if (
        x.device.type != 'cpu'
        or x.dtype not in EMULATED
        or is_traceable_wrapper_subclass(weight)  # quantised, has its own
    ):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)
