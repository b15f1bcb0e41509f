"""The functions of ``tap_codes`` as Triton kernels: one trip through memory.

A program works on some groups of channels, each with its own scale; a group
lies in two halves, whose codes share bytes where they have 4 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va_mm.tuners.e3va.tap_codes import (
    SAMPLE,
    TINY,
    Form,
    empty_codes,
    sampling_step,
)

# Values that a program has in registers.
TILE = 4096


def statistics(tap: Tensor) -> Tensor:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.statistics`."""
    tokens, width = tap.shape
    step = sampling_step(tokens)
    found = tap.new_empty((2, width), dtype=torch.float32)
    columns, rows = 32, 64
    with _on(tap):
        _statistics[(triton.cdiv(width, columns),)](
            tap, found, triton.cdiv(tokens, step), width, step, tap.stride(0),
            TINY, SAMPLE, rows, columns,
        )  # fmt: skip
    return found


def encode(tap: Tensor, channels: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.encode`."""
    codes, scale = empty_codes(tap, form)
    groups, shape = _grid(scale, tap.shape[1], form)
    with _on(tap):
        _encode[groups](
            tap, channels, codes, scale, *shape, tap.shape[1], tap.stride(0),
            form.steps, TINY, form.bits == 4, *_tile(shape),
        )  # fmt: skip
    return codes, scale


def decode(
    codes: Tensor,
    scale: Tensor,
    width: int,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`e3va_mm.tuners.e3va.tap_codes.decode`."""
    out = codes.new_empty((len(codes), width), dtype=dtype)
    groups, shape = _grid(scale, width, form)
    with _on(codes):
        _decode[groups](
            codes, scale, out, *shape, form.bits == 4, *_tile(shape)
        )
    return out


def _on(tensor: Tensor) -> object:
    """Kernels start on the device that is current."""
    return torch.cuda.device_of(tensor)


def _grid(scale: Tensor, width: int, form: Form) -> tuple:
    """The programs, and (all groups, those of a token, channels, bytes)."""
    group = form.group_of(width)
    shape = scale.numel(), scale.shape[1], group, form.bytes_of(group)
    return (triton.cdiv(shape[0], _tile(shape)[0]),), shape


def _tile(shape: tuple[int, ...]) -> tuple[int, int]:
    """Groups and bytes that a program works on."""
    wide = triton.next_power_of_2(shape[3])
    return max(1, TILE // 2 // wide), wide


@triton.jit
def _statistics(
    tap, found, tokens, width, step, stride,
    tiny: tl.constexpr, most: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, most, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < tokens)[:, None] & (column < width)[None]
        place = (row * step).to(tl.int64)[:, None] * stride + column[None]
        x = tl.load(tap + place, there, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        square += tl.sum(x * x, 0)
    mean, square = total / tokens, square / tokens
    variance = square - mean * mean
    least = 1e-6 * square
    # A comparison with what is no number is false.
    variance = tl.where(variance < least, least, variance)
    deviation = tl.sqrt(variance)
    deviation = tl.where(deviation < tiny, tiny, deviation)
    tl.store(found + column, mean, column < width)
    tl.store(found + width + column, deviation, column < width)


@triton.jit
def _standardised(tap, channels, place, channel, width, there):
    x = tl.load(tap + place, there, other=0.0).to(tl.float32)
    mean = tl.load(channels + channel, there, other=0.0)
    deviation = tl.load(channels + width + channel, there, other=1.0)
    return tl.where(there, (x - mean) / deviation, 0.0)


@triton.jit
def _encode(
    tap, channels, codes, scale, count, groups, group, half, width, stride,
    steps: tl.constexpr, tiny: tl.constexpr, PACKED: tl.constexpr,
    GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, HALF)
    inside = (index < count)[:, None] & (lane < half)[None]
    channel = (index % groups * group)[:, None] + lane[None]
    place = (index // groups).to(tl.int64)[:, None] * stride + channel
    low = _standardised(tap, channels, place, channel, width, inside)
    largest = tl.max(tl.abs(low), 1)
    # The largest of what is no number may be one.
    bad = tl.sum(low * 0.0, 1)
    if PACKED:
        upper = inside & (lane + half < group)[None]
        high = _standardised(
            tap, channels, place + half, channel + half, width, upper
        )
        largest = tl.maximum(largest, tl.max(tl.abs(high), 1))
        bad += tl.sum(high * 0.0, 1)
    by = largest / steps
    by = tl.where(by < tiny, tiny, by) + bad
    by = by.to(scale.dtype.element_ty)
    tl.store(scale + index, by, index < count)
    inverse = 1.0 / by.to(tl.float32)[:, None]
    if PACKED:
        code = tl.clamp(low * inverse + 8.0, 0.0, 15.0).to(tl.uint8)
        more = tl.clamp(high * inverse + 8.0, 0.0, 15.0).to(tl.uint8)
        code = code | tl.where(upper, more << 4, 0).to(tl.uint8)
    else:
        code = tl.floor(low * inverse + 0.5).to(tl.int8)
    to = index.to(tl.int64)[:, None] * half + lane[None]
    tl.store(codes + to, code, inside)


@triton.jit
def _decode(
    codes, scale, out, count, groups, group, half,
    PACKED: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, HALF)
    inside = (index < count)[:, None] & (lane < half)[None]
    at = index.to(tl.int64)[:, None]
    code = tl.load(codes + at * half + lane[None], inside, other=0)
    by = tl.load(scale + index, index < count, other=0.0)
    by = by.to(tl.float32)[:, None]
    to = out + at * group + lane[None]
    if PACKED:
        low = ((code & 15).to(tl.float32) - 7.5) * by
        high = ((code >> 4).to(tl.float32) - 7.5) * by
        tl.store(to, low.to(out.dtype.element_ty), inside)
        upper = inside & (lane + half < group)[None]
        tl.store(to + half, high.to(out.dtype.element_ty), upper)
    else:
        value = code.to(tl.float32) * by
        tl.store(to, value.to(out.dtype.element_ty), inside)
