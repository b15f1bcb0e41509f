"""Matrix products by the fastest way that a CPU has."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va_mm.numerics.temporaries import runs_as_on_gpu

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
# Whether products in single precision are faster in oneDNN.
ONEDNN = torch.backends.cpu.get_cpu_capability() == 'AVX512' and hasattr(
    torch.ops.mkldnn, '_linear_pointwise'
)


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or single precision where its products are emulated."""
    if dtype in EMULATED and not runs_as_on_gpu(device):
        return torch.float32
    return dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, single precision at least: for sums and differences."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., C) -> (..., C') in the type of ``x``.

    Products in 16 bits sum in single precision and round once. Where a CPU
    has no instructions for them, single precision from the start gives the
    same several times as fast; what is kept for backward has 16 bits.

    Products in single precision go to oneDNN where the CPU has AVX-512 and no
    gradient is asked for: MKL, which torch prefers, leaves half of such a
    CPU unused if Intel has not made it.
    """
    if is_traceable_wrapper_subclass(weight):  # quantised, has its own
        return F.linear(x, weight, bias)
    if fast_dtype(x.dtype, x.device) != x.dtype:
        keeps = torch.is_grad_enabled() and not is_traced()
        return (_Widened.apply if keeps else _widened)(x, weight, bias)
    if ONEDNN and _is_plain(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, 'none', [], ''
        )
    return F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = fast_dtype(x.dtype, x.device)
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


class _Widened(torch.autograd.Function):
    """Keeps what came in, not what single precision makes of it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _widened(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t())
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_weight = transposed_product(grad, x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype)
        return grad_x, grad_weight, grad_bias


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``: (n, k) and (k, m) -> (n, m), as :func:`linear` does it."""
    if out is None:
        return linear(a, b.t())
    if runs_as_on_gpu(a.device):
        return torch.mm(a, b, out=out)
    return out.copy_(linear(a, b.t()))


def transposed_product(
    a: Tensor, b: Tensor, out: Tensor | None = None
) -> Tensor:
    """``a.t() @ b``: (n, k) and (n, m) -> (k, m)."""
    if out is not None and runs_as_on_gpu(a.device):
        return torch.mm(a.t(), b, out=out)
    # The larger side takes the place of the tokens.
    if a.shape[1] > b.shape[1]:
        found = linear(b.t(), a.t()).t()
    else:
        found = linear(a.t(), b.t())
    return found if out is None else out.copy_(found)


def grouped_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``a_k @ b_k + bias_k``: (K, n, k), (K, k, m), (K, m) -> (K, n, m)."""
    if runs_as_on_gpu(a.device):
        if bias is not None:
            return torch.baddbmm(bias[:, None], a, b)
        return torch.bmm(a, b, out=out)
    biases = [None] * len(a) if bias is None else bias
    done = (
        linear(one, other.t(), add)
        for one, other, add in zip(a, b, biases, strict=True)
    )
    return _together(done, len(a), out)


def grouped_transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a_k.t() @ b_k``: (K, n, k) and (K, n, m) -> (K, k, m)."""
    if runs_as_on_gpu(a.device):
        return torch.bmm(a.mT, b)
    done = (
        transposed_product(one, other) for one, other in zip(a, b, strict=True)
    )
    return _together(done, len(a), None)


def _together(
    parts: Iterable[Tensor], count: int, out: Tensor | None
) -> Tensor:
    if out is not None:
        for target, part in zip(out, parts, strict=True):
            target.copy_(part)
        return out
    return next(iter(parts))[None] if count == 1 else torch.stack([*parts])


def is_traced() -> bool:
    """Whether what runs is being written down, by a trace or an export."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether a product in single precision is all that is asked for."""
    if is_traced():
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, nn.Parameter)  # not those of an export
        and not runs_as_on_gpu(tensor.device)
        and tensor.dtype == torch.float32
        and tensor.numel()
        and not (grad and tensor.requires_grad)
        for tensor in tensors
        if tensor is not None
    )
