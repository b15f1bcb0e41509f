"""E3VA-Late: a side path that ends in blocks with a graph."""

import copy

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Trunk
from tests.helpers import build_e3va
from tests.trunk_cases import (
    awake,
    build_ours,
    flat,
    image_for,
    ours_and_stock,
    stock_outputs,
)


def late(count, inside='Adapter', **options):
    inside = dict(type=inside, **options)
    kind = dict(type='e3va_mm.E3VALate', width=8, rank=4)
    return dict(kind, late=count, inside=inside)


# By the form of their tokens, and what lies between their stages.
@pytest.mark.parametrize(
    'name, count',
    [
        ('vit', 1),
        ('vit', 2),
        ('vit', 3),
        ('eva02', 2),
        ('beit, shared bias', 1),
        ('mmseg vit, class token', 3),
        ('hivit', 2),
        ('swin of mmdet', 1),
        ('swin of mmdet', 4),
        ('timm swin', 3),
        ('convnext', 2),
        ('mit', 2),
        ('svt', 2),
        ('mscan', 1),
        ('dinov3', 3),
    ],
)
def test_begins_as_the_stock_backbone_and_trains_whole(name, count):
    ours, stock = ours_and_stock(name, tuner=late(count))
    image = image_for(name)
    found, expected = flat(ours(image)), stock_outputs(name, stock, image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    sum(each.sum() for each in found).backward()
    for key, parameter in ours.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key


def test_blocks_run_on_from_trunk_and_highway(monkeypatch):
    ours, stock = ours_and_stock('vit', tuner=late(2))
    awake(ours)
    for parameter in ours.tuner.inside.parameters():
        torch.nn.init.zeros_(parameter)
    entries, run = [], Trunk.run_behind

    def record(trunk, image, tokens, on_end):
        entries.append(tokens)
        run(trunk, image, tokens, on_end)

    monkeypatch.setattr(Trunk, 'run_behind', record)
    image = image_for('vit')
    with torch.no_grad():
        found = ours(image)[-1]
        stock.layers[1].register_forward_hook(lambda *_: entries[0])
        expected = stock(image)[-1]
    torch.testing.assert_close(found, expected)


def test_a_highway_of_zero_leaves_the_tuner_in_the_last_blocks():
    ours = build_ours('vit', tuner=late(1, 'LoRA', rank=2))
    whole = build_ours('vit', tuner=dict(type='LoRA', rank=2))
    (update,) = ours.tuner.inside.updates
    for parameter in update.parameters():
        torch.nn.init.normal_(parameter)
    own = ours.state_dict()
    state = {k: own.get(k, v) for k, v in whole.state_dict().items()}
    whole.load_state_dict(state)
    whole.tuner.updates[-1].load_state_dict(update.state_dict())
    image = image_for('vit')
    for a, b in zip(ours(image), whole(image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_graph_before_the_last_blocks():
    ours = awake(build_ours('vit', tuner=late(1)))
    seen = []
    for layer in ours.layers:
        layer.register_forward_hook(
            lambda _, inputs, output: seen.append(output.requires_grad)
        )
    ours(image_for('vit'))
    # The blocks before are passed by in the second run.
    assert seen == [False, False, False, False, False, True, True]


@pytest.mark.parametrize('bad', [0, 2, 6])
def test_where_it_cannot_begin(bad):
    with pytest.raises(ConfigError) as error:
        build_e3va(tuner=late(bad))
    if bad:
        assert 'one of 4, 3, 1, as this trunk has 6 blocks' in str(error.value)


@pytest.mark.parametrize('inside', ['Full', 'E3VA'])
def test_tuners_that_cannot_be_inside(inside):
    with pytest.raises(ConfigError, match='parameters of its own to blocks'):
        build_e3va(tuner=late(1, inside))


@pytest.mark.parametrize('name, count', [('dinov2', 1), ('swin of mmdet', 3)])
def test_copies_autocast_and_switching_off(name, count):
    ours, stock = ours_and_stock(name, tuner=late(count))
    awake(ours)
    other = copy.deepcopy(ours)
    image = image_for(name)
    with torch.no_grad():
        before = flat(ours(image))
        for a, b in zip(before, flat(other(image)), strict=True):
            assert torch.equal(a, b)
        for parameter in other.tuner.inside.parameters():
            parameter.add_(0.5)
        assert not torch.equal(before[-1], flat(other(image))[-1])
        assert torch.equal(before[-1], flat(ours(image))[-1])
    with torch.autocast('cpu', torch.bfloat16):
        loss = sum(each.float().sum() for each in flat(ours(image)))
    loss.backward()
    trained = [p.grad for p in ours.parameters() if p.requires_grad]
    assert all(torch.isfinite(grad).all() for grad in trained)
    ours.tuner.enabled = False
    expected = stock_outputs(name, stock, image)
    for a, b in zip(flat(ours(image)), expected, strict=True):
        assert torch.equal(a, b)


def test_a_pass_is_not_shared():
    ours, other = build_e3va(tuner=late(1)), build_e3va()
    for one, two in ((ours, other), (other, ours)):
        with pytest.raises(ConfigError, match='tunes the last blocks from'):
            one.share_trunk(two)
