"""A trunk without a side path: what E3VA is compared with."""

import copy

import pytest
import torch

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.measure import kept_for_backward
from e3va_mm.utils import count_parameters
from tests.helpers import build_e3va, e3va_and_stock

IMAGE = (2, 3, 101, 75)
NONE = dict(type='e3va_mm.NoSidePath')
FROZEN = dict(NONE, train_output_norms=False)


@pytest.mark.parametrize('train', [True, False])
def test_equals_the_stock_frozen_backbone(train):
    ours, stock = e3va_and_stock(tuner=FROZEN)
    image = torch.randn(IMAGE)
    outputs = ours.train(train)(image)
    for output, expected in zip(outputs, stock(image), strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('preset', ['exact', 'lean'])
def test_frozen_trains_and_keeps_nothing(preset):
    ours, _ = e3va_and_stock(tuner=dict(FROZEN, preset=preset))
    assert count_parameters(ours)[1] == 0
    assert kept_for_backward(ours, torch.randn(IMAGE)) == 0
    # Before its first step E3VA differs in nothing.
    tuned, _ = e3va_and_stock(tuner=dict(preset=preset))
    image = torch.randn(IMAGE)
    for output, expected in zip(tuned(image), ours(image), strict=True):
        assert torch.equal(output, expected)


def test_output_norms_train_and_keep_their_outputs():
    ours, _ = e3va_and_stock(tuner=NONE)
    widths = [32, 64, 128, 256]
    assert count_parameters(ours)[1] == 2 * sum(widths)
    # 26 x 19 tokens, then half of that, rounded up; a deviation for each.
    tokens = [26 * 19, 13 * 10, 7 * 5, 4 * 3]
    assert kept_for_backward(ours, torch.randn(IMAGE)) == sum(
        2 * count * (width + 1) * 4
        for count, width in zip(tokens, widths, strict=True)
    )
    sum(o.square().mean() for o in ours(torch.randn(IMAGE))).backward()
    trained = {
        name.split('.')[0]
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    }
    assert trained == {'norm0', 'norm1', 'norm2', 'norm3'}


def test_its_state_is_that_of_a_stock_backbone():
    ours, stock = e3va_and_stock(tuner=NONE)
    assert set(ours.state_dict()) == set(stock.state_dict())
    # A side path in a file has nowhere to go.
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match='side_path'):
        ours.load_state_dict(build_e3va().state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])


def test_options_of_adapters_are_refused():
    build_e3va(tuner=dict(NONE, save_taps='int8'))  # presets bring it
    with pytest.raises(ConfigError, match='`tuner.rank` is unknown. Options'):
        build_e3va(tuner=dict(NONE, rank=8))
