import pytest
import torch
from torch.nn import functional as F

from e3va_mm.tuners.e3va import LowRankAdapter


@pytest.mark.parametrize(
    'channels, rank, ratio', [(96, 16, 0.5), (32, 4, 1.0), (50, 3, 0.25)]
)
def test_parameter_count(channels, rank, ratio):
    m, n, r = channels, int(channels * ratio), rank
    adapter = LowRankAdapter(channels, rank, ratio)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 2 * r * (m + n) + n + m


def test_starts_at_zero_with_a_useful_bottleneck():
    adapter = LowRankAdapter(128)
    x = torch.randn(4, 100, 128)
    assert not adapter(x).any()
    # Neither vanishing nor exploding for taps of unit scale.
    assert 0.5 < adapter.down(x).std() < 2.0


def test_equals_the_equation():
    adapter = LowRankAdapter(24, rank=5).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 24, dtype=torch.float64)
    down, up = adapter.down, adapter.up
    weight_1, weight_2 = down.p @ down.q, up.p @ up.q
    expected = F.gelu(x @ weight_1 + down.bias) @ weight_2 + up.bias
    torch.testing.assert_close(adapter(x), expected)
    assert torch.linalg.matrix_rank(weight_1) == 5
