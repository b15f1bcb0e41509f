"""Angles of rotary position embeddings for any grid.

mmpretrain's ``RotaryEmbeddingFast`` computes others than `EVA-02
<https://arxiv.org/abs/2303.11331>`_ was trained with; a converted file brings
the right ones, for one grid. Whichever a trunk holds are carried on to others.
"""

import copy

import torch
from torch import Tensor, nn

Size = tuple[int, int]
NAMES = ('freqs_cos', 'freqs_sin')
# Attribute of a stock module, set where a file brings weights.
MARK = 'has_official_angles'
# Side of the grid that EVA-02 was pre-trained on.
TRAINED_SIDE = 16


def rotation(rope: nn.Module, size: Size) -> tuple[Tensor, Tensor]:
    """Cosine and sine (H * W, d) of a stock module for a grid.

    Its buffers stay as they are: they are part of the trunk's state, which
    the stock forward would change with the size of the image.
    """
    buffers = rope.freqs_cos, rope.freqs_sin
    native = tuple(rope.patch_resolution)
    if tuple(size) == native:
        return buffers
    with buffers[0].device:  # where factories make tensors
        if getattr(rope, MARK, False):
            found = official(rope.half_dim, size)
        else:
            found = _by_the_class(rope, size)
    return tuple(part.to(buffers[0]) for part in found)


def mark_official(rope: nn.Module, cosine: Tensor) -> None:
    """Note whether what a stock module is to hold are EVA-02's angles."""
    expected, _ = official(rope.half_dim, tuple(rope.patch_resolution))
    setattr(rope, MARK, _same(expected, cosine))


def official(half: int, size: Size) -> tuple[Tensor, Tensor]:
    """Cosine and sine (H * W, 2 * half) as EVA-02 has them.

    Positions are those of the grid it was trained on, whatever the grid.
    """
    frequency = 10000.0 ** (-torch.arange(0, half, 2) / half)
    height, width = (
        (
            torch.arange(side)[:, None] / side * TRAINED_SIDE * frequency
        ).repeat_interleave(2, 1)
        for side in size
    )
    angles = torch.cat(
        (
            height[:, None].expand(-1, len(width), -1),
            width[None].expand(len(height), -1, -1),
        ),
        -1,
    ).flatten(0, 1)
    return angles.cos(), angles.sin()


def fit_rotations(
    expected: dict[str, Tensor], found: dict[str, Tensor], size: Size
) -> list[str]:
    """Fit the angles of a file to a grid, in place.

    A file that has none leaves them as the class computes them.
    """
    carried = 0
    # One module, under the name of the trunk's and that of every block's.
    given = {k.rpartition('.')[2]: v for k, v in found.items()}
    for key, ours in expected.items():
        name = key.rpartition('.')[2]
        if name not in NAMES:
            continue
        theirs = found.get(key, given.get(name))
        if theirs is None or theirs.ndim != 2:
            found[key] = ours
        elif theirs.shape == ours.shape:
            found[key] = theirs
        else:
            side = round(len(theirs) ** 0.5)
            place = NAMES.index(name)
            half = ours.shape[1] // 2
            there = official(half, (side, side))[place]
            known = _same(there, theirs)
            found[key] = official(half, size)[place] if known else ours
            carried += 1
    if not carried:
        return []
    return [f'{carried} tables of rotary angles computed for the grid {size}']


def _by_the_class(rope: nn.Module, size: Size) -> tuple[Tensor, Tensor]:
    other = copy.copy(rope)
    other.patch_resolution = size
    return other.compute_position_embedding()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other.to(one), atol=1e-3
    )
