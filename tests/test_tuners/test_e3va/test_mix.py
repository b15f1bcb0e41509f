"""E3VA-Mix in a backbone."""

import copy

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.utils import count_parameters
from tests.helpers import SWIN, build_e3va, e3va_and_stock
from tests.trunk_cases import build_ours, image_for

MIX = dict(type='e3va_mm.E3VAMixSidePath')


def awake(ours):
    torch.manual_seed(2)
    for parameter in ours.side_path.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return ours


def gradients(ours, image):
    torch.manual_seed(3)
    outputs = ours(image)
    loss = sum((o * torch.randn_like(o)).sum() for o in outputs)
    loss.backward()
    return {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}


def test_begins_as_the_stock_backbone():
    ours, stock = e3va_and_stock(side_path=MIX)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(ours.eval()(image), stock(image), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('size, counts', [('b', 1_936_640), ('l', 2_728_832)])
def test_numbers_of_parameters(size, counts):
    # Of one tap, and 513 C + 88,064 for each of the stages.
    ours = build_e3va(**SWIN[size], side_path=MIX)
    assert count_parameters(ours)[1] == counts


def test_all_of_it_trains():
    ours = awake(build_e3va(side_path=MIX))
    found = gradients(ours, torch.randn(1, 3, 64, 64))
    assert all(grad.norm() > 0 for grad in found.values())
    assert {n.split('.')[1] for n in found if 'mixers' in n} == {'mixers'}


@pytest.mark.parametrize('save_taps', ['recompute', ('recompute', 'int8')])
def test_taps_that_come_again_give_the_same_gradients(save_taps):
    ours = awake(build_e3va(side_path=dict(MIX, save_taps='exact')))
    image = torch.randn(1, 3, 64, 64)
    expected = gradients(ours, image)
    other = build_e3va(side_path=dict(MIX, save_taps=save_taps))
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for name, grad in gradients(other, image).items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if save_taps == 'recompute' else 0.15), name


def test_it_can_be_traced():
    ours = awake(build_e3va(side_path=MIX)).eval()
    image = torch.randn(1, 3, 64, 64)
    traced = torch.jit.trace(ours, image, check_trace=False)
    for a, b in zip(traced(image), ours(image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gradients_under_amp_are_near():
    ours = awake(build_e3va(side_path=MIX))
    image = torch.randn(1, 3, 64, 64)
    expected = gradients(ours, image)
    ours.zero_grad()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = gradients(ours, image)
    for name, grad in found.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, name


def test_the_highway_carries_the_mix_to_the_next_stage():
    ours = awake(build_e3va(side_path=MIX)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = ours(image)
        for parameter in ours.side_path.mixers[0].parameters():
            parameter.mul_(2)
        after = ours(image)
    assert all(
        not torch.allclose(a, b) for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize('trunk', ['vit', 'convnext', 'timm swin', 'mit'])
def test_beside_other_trunks(trunk):
    ours = awake(build_ours(trunk, side_path=dict(MIX, width=8)))
    found = gradients(ours, image_for(trunk))
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert all(grad.norm() > 0 for n, grad in found.items() if 'mixers' in n)


def test_adapters_read_the_last_tap_of_a_block():
    assert build_e3va(side_path=MIX).side_path.taps == ('ffn',)
    both = dict(MIX, taps=['attn', 'ffn'])
    assert build_e3va(side_path=both).side_path.taps == ('attn', 'ffn')


@pytest.mark.parametrize('value', [0, 1.5, True, 'many'])
def test_an_impossible_width(value):
    with pytest.raises(ConfigError, match='`side_path.width` should be a'):
        build_e3va(side_path=dict(MIX, width=value))
