"""Taps as integers, in plain torch, some tokens at a time.

The reference. On a GPU it would take a dozen trips through memory, for which
:mod:`~e3va_mm.tuners.e3va.tap_ops` has one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from e3va_mm.numerics.temporaries import temporary_bytes

# Tokens from which mean and deviation of the channels are taken.
SAMPLE = 1024
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Form:
    """How the levels of a token become codes.

    Attributes:
        bits (int): 8, or 4 with two codes in a byte: of the first and of the
            second half of a group.
        group (int, optional): Channels that share a scale, at most; None for
            all of a token.
        scale_type (torch.dtype): Type of the scales.
    """

    bits: int
    group: int | None
    scale_type: torch.dtype

    @property
    def steps(self) -> int:
        """The largest level."""
        return 127 if self.bits == 8 else 8

    @property
    def code_type(self) -> torch.dtype:
        """The type of what holds the codes."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def group_of(self, channels: int) -> int:
        """Channels that share a scale: as many as divide the width."""
        return math.gcd(channels, self.group or channels)

    def bytes_of(self, group: int) -> int:
        """What the codes of a group take."""
        return group if self.bits == 8 else -(-group // 2)


INT8 = Form(8, None, torch.float32)
INT4 = Form(4, 128, torch.bfloat16)


def statistics(tap: Tensor) -> Tensor:
    """Mean and deviation of each channel, about: (N, C) -> (2, C) in fp32."""
    some = tap[:: sampling_step(len(tap))].float()
    mean, square = some.mean(0), some.square().mean(0)
    # At least what rounding leaves of the difference.
    variance = torch.maximum(square - mean.square(), 1e-6 * square)
    return torch.stack([mean, variance.sqrt().clamp_(min=TINY)])


def sampling_step(tokens: int) -> int:
    """Each how manieth token is looked at."""
    return max(1, -(-tokens // SAMPLE))


def encode(tap: Tensor, channels: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The codes and scales of a tap.

    Args:
        tap (Tensor): (N, C).
        channels (Tensor): (2, C), see :func:`statistics`.
        form (Form): Which codes.

    Returns:
        tuple[Tensor, Tensor]: (N, bytes of a token) and (N, groups).
    """
    codes, scale = empty_codes(tap, form)
    inverse = channels[1].reciprocal()
    offset = -channels[0] * inverse
    group = form.group_of(tap.shape[1])
    size = max(1, temporary_bytes(tap.device) // (4 * tap.shape[1]))
    for part, coded, by in zip(
        *(t.split(size) for t in (tap, codes, scale)), strict=True
    ):
        part = torch.addcmul(offset, part.float(), inverse)
        groups = part.unflatten(-1, (-1, group))
        # On CPU several times as fast as `aminmax`, or as a norm.
        largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
        # Zeros, and what is less than has a reciprocal.
        by.copy_(largest.div_(form.steps).clamp_(min=TINY))
        groups.mul_(by.float().reciprocal()[..., None])
        if form.bits == 8:
            coded.copy_(part.round_())
            continue
        # Sixteen levels at -7.5, -6.5, ... 7.5; the cast cuts.
        levels = groups.add_(8).clamp_(0, 15).to(torch.uint8)
        coded = coded.unflatten(-1, (groups.shape[1], -1))
        half = coded.shape[-1]
        coded.copy_(levels[..., :half])
        coded[..., : group - half] |= levels[..., half:] << 4
    return codes, scale


def decode(
    codes: Tensor,
    scale: Tensor,
    width: int,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """Codes and scales -> (N, width), scale times level, in ``dtype``."""
    if form.bits == 8:
        levels = codes.to(dtype)
        return levels.mul_(scale.to(dtype))
    levels = codes.new_empty((len(codes), width), dtype=dtype)
    groups = levels.unflatten(-1, (scale.shape[1], -1))
    packed = codes.unflatten(-1, (scale.shape[1], -1))
    half = packed.shape[-1]
    groups[..., :half] = packed & 15
    groups[..., half:] = packed[..., : groups.shape[-1] - half] >> 4
    groups.sub_(7.5).mul_(scale.to(dtype)[..., None])
    return levels


def empty_codes(tap: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Room for the codes and scales of a tap (N, C)."""
    tokens, width = tap.shape
    group = form.group_of(width)
    groups = width // group
    return (
        tap.new_empty(
            (tokens, groups * form.bytes_of(group)), dtype=form.code_type
        ),
        tap.new_empty((tokens, groups), dtype=form.scale_type),
    )
