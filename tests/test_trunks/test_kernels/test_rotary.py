"""Rotary angles on grids that a file was not made for."""

import math

import pytest
import torch

from e3va_mm.trunks.kernels.rotary import (
    fit_rotations,
    mark_official,
    official,
    rotation,
)

pytest.importorskip('mmpretrain')

HALF = 8


def stock_rope(size):
    from mmpretrain.models.utils import RotaryEmbeddingFast

    return RotaryEmbeddingFast(2 * HALF, size)


def by_hand(height, width):
    """Angle of every token and channel, as EVA-02's authors have them."""
    rows = []
    for y in range(height):
        for x in range(width):
            row = []
            for place in (y / height * 16, x / width * 16):
                for pair in range(HALF // 2):
                    row += 2 * [place * 10000 ** (-2 * pair / HALF)]
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize('size', [(16, 16), (3, 5)])
def test_the_official_angles(size):
    cos, sin = official(HALF, size)
    angles = by_hand(*size)
    torch.testing.assert_close(cos, angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, angles.sin(), atol=1e-5, rtol=0)


def test_what_the_trunk_holds_goes_on_to_other_grids():
    rope = stock_rope((4, 4))
    mark_official(rope, rope.freqs_cos)
    # As the class computes them.
    expected = stock_rope((2, 6))
    cos, sin = rotation(rope, (2, 6))
    assert torch.equal(cos, expected.freqs_cos)
    assert torch.equal(sin, expected.freqs_sin)
    # As a converted file has them.
    rope.freqs_cos, rope.freqs_sin = official(HALF, (4, 4))
    mark_official(rope, rope.freqs_cos)
    cos, _ = rotation(rope, (2, 6))
    torch.testing.assert_close(cos, by_hand(2, 6).cos(), atol=1e-5, rtol=0)
    assert rotation(rope, (4, 4))[0] is rope.freqs_cos
    assert rope.patch_resolution == (4, 4)


def test_a_file_of_another_grid_is_carried_on():
    ours = stock_rope((3, 3)).state_dict()
    expected = {f'rope.{k}': v for k, v in ours.items()}
    expected |= {f'layers.0.attn.rope.{k}': v for k, v in ours.items()}
    cos, sin = official(HALF, (5, 5))
    prefix = 'layers.0.attn.rope.freqs'
    found = {f'{prefix}_cos': cos, f'{prefix}_sin': sin}
    (note,) = fit_rotations(expected, found, (3, 3))
    assert 'computed for the grid (3, 3)' in note
    for key in ('rope.freqs_cos', f'{prefix}_cos'):
        torch.testing.assert_close(
            found[key], by_hand(3, 3).cos(), atol=1e-5, rtol=0
        )
    # Of the same grid they are taken, of none left.
    same = official(HALF, (3, 3))[0]
    found = {f'{prefix}_cos': same}
    assert fit_rotations(expected, found, (3, 3)) == []
    assert found['rope.freqs_cos'] is same
    assert found['rope.freqs_sin'] is ours['freqs_sin']
    assert math.isfinite(float(found['rope.freqs_cos'].sum()))
