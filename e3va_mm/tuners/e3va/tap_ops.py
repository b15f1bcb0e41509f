"""Coding of taps as operators of torch: one kernel each on a CUDA device.

There Triton's kernels run, if it is installed, elsewhere the reference of
:mod:`~e3va_mm.tuners.e3va.tap_codes`.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from e3va_mm.numerics.temporaries import runs_as_on_gpu
from e3va_mm.tuners.e3va import tap_codes
from e3va_mm.tuners.e3va.tap_codes import INT4, INT8, Form, empty_codes

FORMS = {form.bits: form for form in (INT8, INT4)}


def statistics(tap: Tensor) -> Tensor:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.statistics`."""
    if runs_as_on_gpu(tap.device):
        return torch.ops.e3va.tap_statistics(tap)
    return tap_codes.statistics(tap)


def encode(tap: Tensor, channels: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.encode`."""
    if runs_as_on_gpu(tap.device):
        return torch.ops.e3va.encode_tap(tap, channels, form.bits)
    return tap_codes.encode(tap, channels, form)


def decode(
    codes: Tensor,
    scale: Tensor,
    width: int,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.decode`."""
    if runs_as_on_gpu(codes.device):
        return torch.ops.e3va.decode_tap(codes, scale, width, form.bits, dtype)
    return tap_codes.decode(codes, scale, width, form, dtype)


@torch.library.custom_op('e3va::tap_statistics', mutates_args=())
def tap_statistics(tap: Tensor) -> Tensor:
    """The operator; see :func:`statistics`."""
    return _kernels(tap.device.type).statistics(tap)


@tap_statistics.register_fake
def _(tap: Tensor) -> Tensor:
    return tap.new_empty((2, tap.shape[1]), dtype=torch.float32)


@torch.library.custom_op('e3va::encode_tap', mutates_args=())
def encode_tap(
    tap: Tensor, channels: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The operator; see :func:`encode`."""
    return _kernels(tap.device.type).encode(tap, channels, FORMS[bits])


@encode_tap.register_fake
def _(tap: Tensor, channels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return empty_codes(tap, FORMS[bits])


@torch.library.custom_op('e3va::decode_tap', mutates_args=())
def decode_tap(
    codes: Tensor, scale: Tensor, width: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """The operator; see :func:`decode`."""
    kernels = _kernels(codes.device.type)
    return kernels.decode(codes, scale, width, FORMS[bits], dtype)


@decode_tap.register_fake
def _(
    codes: Tensor, scale: Tensor, width: int, bits: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((len(codes), width), dtype=dtype)


@cache  # a step asks a hundred times, and to find nothing takes longest
def _kernels(device: str) -> Any:
    """The module that computes on a type of device."""
    if device == 'cuda' and importlib.util.find_spec('triton'):
        from e3va_mm.tuners.e3va import tap_kernels

        return tap_kernels
    return tap_codes
