import pytest
import torch
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.tuners.e3va import AdapterBank


@pytest.mark.parametrize(
    'channels, rank, ratio', [(96, 16, 0.5), (32, 4, 1.0), (50, 3, 0.25)]
)
def test_parameter_count(channels, rank, ratio):
    m, n, r = channels, int(channels * ratio), rank
    bank = AdapterBank('ab', channels, rank, ratio)
    count = sum(p.numel() for p in bank.parameters())
    assert count == len(bank) * (2 * r * (m + n) + n + m)


def test_starts_at_zero_with_a_useful_bottleneck():
    bank = AdapterBank('ab', 128)
    x = torch.randn(2, 400, 128)
    assert not bank(x).any()
    # Neither vanishing nor exploding for taps of unit scale.
    assert 0.5 < bank.down(x).std() < 2.0


def test_equals_the_equation():
    bank = AdapterBank('ab', 24, rank=5).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    down, up = bank.down, bank.up
    for k, got in enumerate(bank(x)):
        weight_1, weight_2 = down.p[k] @ down.q[k], up.p[k] @ up.q[k]
        inner = F.gelu(x[k] @ weight_1 + down.bias[k])
        torch.testing.assert_close(got, inner @ weight_2 + up.bias[k])
        assert torch.linalg.matrix_rank(weight_1) == 5


def test_a_state_of_earlier_versions_is_stacked_if_it_is_whole():
    bank = AdapterBank(('0.attn', '0.ffn'), 8, rank=2)
    state = {f'x.{key}': value for key, value in bank.state_dict().items()}
    older = {
        f'x.{name}.{key}': value[i]
        for i, name in enumerate(bank.names)
        for key, value in bank.state_dict().items()
    }
    stacked = {'other': torch.ones(1), **older}
    bank.stack(stacked, 'x.')
    assert stacked.pop('other') == 1
    assert stacked.keys() == state.keys()
    assert all(torch.equal(stacked[key], state[key]) for key in state)
    # What is missing, or has another shape, is left for the loader to name.
    older['x.0.ffn.down.q'] = torch.ones(3, 3)
    del older['x.0.ffn.up.q']
    kept = dict(older)
    bank.stack(kept, 'x.')
    assert {'x.0.attn.up.q', 'x.0.ffn.down.q'} <= kept.keys()


@pytest.mark.parametrize(
    'channels, rank, ratio, text',
    [
        (8, 9, 0.5, r'`tuner.rank` should be in \[1, 4\] \(the bottleneck'),
        (8, 1, 0.1, 'a stage of 8 channels a bottleneck of at least one, but'),
    ],
)
def test_sizes_that_cannot_be(channels, rank, ratio, text):
    with pytest.raises(ConfigError, match=text):
        AdapterBank('a', channels, rank, ratio)
