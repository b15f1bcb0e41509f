"""A trunk without a side path: what E3VA is compared with."""

import copy

import pytest
import torch

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.measure.kept import kept_for_backward
from e3va_mm.utils import count_parameters
from tests.helpers import build_e3va, e3va_and_stock

IMAGE = (2, 3, 101, 75)
NONE = dict(type='e3va_mm.NoSidePath')
FROZEN = dict(NONE, train_output_norms=False)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_equals_the_stock_frozen_backbone(scope, train):
    ours, stock = e3va_and_stock(scope, side_path=FROZEN)
    ours.train(train)
    image = torch.randn(IMAGE)
    outputs = ours(image)
    assert len(outputs) == 4
    for output, expected in zip(outputs, stock(image), strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('preset', ['exact', 'lean'])
def test_frozen_trains_nothing_and_keeps_nothing(preset):
    ours, _ = e3va_and_stock(side_path=dict(FROZEN, preset=preset))
    assert count_parameters(ours)[1] == 0
    ours(torch.randn(IMAGE))  # stores its weights
    assert kept_for_backward(ours, torch.randn(IMAGE)) == 0
    assert count_parameters(ours)[1] == 0


@pytest.mark.parametrize('preset', ['exact', 'lean'])
def test_output_norms_train_and_keep_their_outputs(preset):
    ours, _ = e3va_and_stock(side_path=dict(NONE, preset=preset))
    widths = [32, 64, 128, 256]
    assert count_parameters(ours)[1] == 2 * sum(widths)
    ours(torch.randn(IMAGE))
    # 26 x 19 tokens, then half of that, rounded up; a deviation for each.
    tokens = [26 * 19, 13 * 10, 7 * 5, 4 * 3]
    assert kept_for_backward(ours, torch.randn(IMAGE)) == sum(
        2 * count * (width + 1) * 4
        for count, width in zip(tokens, widths, strict=True)
    )
    sum(
        output.square().mean() for output in ours(torch.randn(IMAGE))
    ).backward()
    for name, parameter in ours.named_parameters():
        trains = name.split('.')[0] in ('norm0', 'norm1', 'norm2', 'norm3')
        assert (parameter.grad is not None) == trains, name


@pytest.mark.parametrize('preset', ['exact', 'lean'])
def test_same_options_compute_the_same_trunk(preset):
    """Before its first step E3VA differs in nothing."""
    ours, _ = e3va_and_stock(side_path=dict(preset=preset))
    frozen, _ = e3va_and_stock(side_path=dict(FROZEN, preset=preset))
    image = torch.randn(IMAGE)
    for output, expected in zip(ours(image), frozen(image), strict=True):
        assert torch.equal(output, expected)


def test_state_is_that_of_a_stock_backbone():
    ours, stock = e3va_and_stock(side_path=NONE)
    assert set(ours.state_dict()) == set(stock.state_dict())
    twin = build_e3va(side_path=NONE)
    twin.load_state_dict(ours.state_dict())
    for name, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_a_side_path_in_a_file_has_nowhere_to_go():
    state = build_e3va().state_dict()
    ours = build_e3va(side_path=NONE)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match='side_path'):
        ours.load_state_dict(state)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])


def test_options_of_adapters_are_refused():
    build_e3va(side_path=dict(NONE, save_taps='int8'))  # presets bring it
    with pytest.raises(ConfigError, match="unexpected keyword.*'rank'"):
        build_e3va(side_path=dict(NONE, rank=8))
