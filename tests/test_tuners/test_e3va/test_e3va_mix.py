"""E3VA-Mix in a backbone."""

import copy

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.utils import count_parameters
from tests.helpers import SWIN, build_e3va, e3va_and_stock
from tests.trunk_cases import (
    build_ours,
    flat,
    image_for,
    ours_and_stock,
    stock_outputs,
)

MIX = dict(type='e3va_mm.E3VAMix', width=32, rank=4)


def awake(ours):
    torch.manual_seed(2)
    for parameter in ours.tuner.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return ours


def gradients(ours, image):
    torch.manual_seed(3)
    ours.zero_grad()
    outputs = flat(ours(image))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    return {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}


@pytest.fixture(scope='module')
def swin():
    return awake(build_e3va(tuner=MIX))


@pytest.fixture
def image():
    return torch.randn(1, 3, 64, 64)


def test_begins_as_the_stock_backbone(image):
    ours, stock = e3va_and_stock(tuner=MIX)
    with torch.no_grad():
        for a, b in zip(ours.eval()(image), stock(image), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('size, counts', [('b', 1_936_640), ('l', 2_728_832)])
def test_numbers_of_parameters(size, counts, without_values):
    # Of one tap, and 513 C + 88,064 for each of the stages.
    ours = build_e3va(**SWIN[size], tuner=dict(type='e3va_mm.E3VAMix'))
    assert count_parameters(ours)[1] == counts


@pytest.mark.parametrize(
    'change, bound',
    [
        (dict(save_taps='recompute'), 1e-4),
        (dict(save_taps=('recompute', 'int8')), 0.15),
        (dict(), 0.1),  # under autocast
    ],
)
def test_all_of_it_trains_however_taps_come(swin, image, change, bound):
    expected = gradients(swin, image)
    assert all(grad.norm() > 0 for grad in expected.values())
    assert any('mixers' in name for name in expected)
    expected = {n: g.clone() for n, g in expected.items()}
    other = build_e3va(tuner=dict(MIX, **change))
    other.load_state_dict(copy.deepcopy(swin.state_dict()))
    with torch.autocast('cpu', torch.bfloat16, enabled=not change):
        found = gradients(other, image)
    for name, grad in found.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < bound, name


def test_it_can_be_traced(swin, image):
    ours = copy.deepcopy(swin).eval()
    traced = torch.jit.trace(ours, image, check_trace=False)
    for a, b in zip(traced(image), ours(image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_highway_carries_the_mix_to_the_next_stage(swin, image):
    ours = copy.deepcopy(swin).eval()
    with torch.no_grad():
        before = ours(image)
        for parameter in ours.tuner.mixers[0].parameters():
            parameter.mul_(2)
        after = ours(image)
    for a, b in zip(before, after, strict=True):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize('trunk', ['vit', 'convnext', 'timm swin', 'mit'])
def test_beside_other_trunks(trunk):
    ours = awake(build_ours(trunk, tuner=dict(MIX, width=8)))
    found = gradients(ours, image_for(trunk))
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert all(grad.norm() > 0 for n, grad in found.items() if 'mixers' in n)


def test_adapters_read_the_last_tap_of_a_block(swin):
    assert swin.tuner.taps == ('ffn',)
    both = dict(MIX, taps=['attn', 'ffn'])
    assert build_e3va(tuner=both).tuner.taps == ('attn', 'ffn')


@pytest.mark.parametrize('value', [0, 1.5, True, 'many'])
def test_an_impossible_width(value):
    with pytest.raises(ConfigError, match='`tuner.width` should be a whole'):
        build_e3va(tuner=dict(MIX, width=value))


def test_mixers_between_the_outputs_of_a_plain_trunk():
    ours, stock = ours_and_stock('vit', tuner=dict(MIX, mix_every=1))
    assert len(ours.tuner.mixers) == 4
    image = image_for('vit')
    found, expected = ours(image), stock_outputs('vit', stock, image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected = gradients(awake(ours), image)
    assert all(grad.norm() > 0 for grad in expected.values())
    expected = {n: g.clone() for n, g in expected.items()}
    lean = dict(MIX, mix_every=1, save_taps='recompute')
    other = build_ours('vit', tuner=lean)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for name, grad in gradients(other, image).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3)


def test_stages_are_not_divided_where_they_are_the_trunk_s_own():
    with pytest.raises(ConfigError, match='Transformer has stages of its own'):
        build_e3va(tuner=dict(MIX, mix_every=1))
