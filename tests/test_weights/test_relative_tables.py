"""BEiT's tables of relative positions for another grid."""

import torch

from e3va_mm.weights.relative_tables import resize_relative_tables

KEY = 'layers.0.attn.relative_position_bias_table'


def places(old, new):
    """Where old distances lie among the new, by solving for the ratio."""
    count, farthest = old - 1, new - 1
    low, high = 1.0001, 3.0
    for _ in range(100):
        ratio = (low + high) / 2
        reach = sum(ratio**i for i in range(count))
        low, high = (low, ratio) if reach > farthest else (ratio, high)
    one = [sum(ratio**i for i in range(k + 1)) for k in range(count)]
    return torch.tensor([-x for x in one[::-1]] + [0.0] + one)


def cubic(y, x):
    """What a bicubic spline reproduces."""
    y, x = y[:, None], x[None]
    return 0.01 * y**3 - 0.02 * y * x**2 + 0.3 * x + 1


def test_near_distances_keep_their_places_and_far_ones_are_spread():
    old, new, heads = 5, 8, 3
    at = places(old, new)
    table = cubic(at, at).reshape(-1, 1).repeat(1, heads)
    extra = torch.randn(3, heads)
    found = {KEY: torch.cat([table, extra])}
    expected = {KEY: torch.zeros((2 * new - 1) ** 2 + 3, heads)}
    (note,) = resize_relative_tables(expected, found)
    assert note == '1 tables of relative positions resized'
    grid = torch.arange(1 - new, new).float()
    torch.testing.assert_close(
        found[KEY][:-3],
        cubic(grid, grid).reshape(-1, 1).repeat(1, heads),
        rtol=1e-3,
        atol=1e-2,
    )
    assert torch.equal(found[KEY][-3:], extra)


def test_a_shared_table_is_fitted_to_the_blocks():
    shared = 'rel_pos_bias.relative_position_bias_table'
    found = {shared: torch.randn(7**2 + 3, 2)}
    expected = {KEY: torch.zeros(11**2 + 3, 2)}
    resize_relative_tables(expected, found)
    assert found[shared].shape == expected[KEY].shape


def test_what_fits_or_cannot_fit_is_left():
    same, other = torch.randn(52, 2), torch.randn(52, 4)
    for table in (same, other):
        found = {KEY: table}
        assert resize_relative_tables({KEY: torch.zeros(52, 2)}, found) == []
        assert found[KEY] is table
