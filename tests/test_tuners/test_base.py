"""What all tuners have in common, on trunks of different kinds."""

import copy
import functools

import pytest
import torch
from mmcv.cnn.bricks import DropPath
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.test_tuners.cases import INSIDE, TUNERS, loss_of, wake
from tests.test_tuners.one_block import IMAGE, TRUNK, build
from tests.trunk_cases import (
    build_ours,
    build_stock,
    flat,
    image_for,
    ours_and_stock,
    stock_outputs,
)

KINDS = ('dinov2', 'swin of mmdet', 'convnext', 'mscan')
PAIRS = [(t, k) for t in TUNERS if t != 'lora' for k in KINDS]
PAIRS += [
    ('lora', trunk)
    for trunk in ('dinov2', 'eva02', 'sam', 'swin of mmdet', 'timm vit')
]
# One tuner inside, and one that needs the grid, on all others.
PAIRS += [
    ('mona', trunk)
    for trunk in (
        *('vit', 'beit', 'eva02', 'mmseg vit', 'swin of mmseg', 'swin'),
        *('swin v2', 'pvtv2', 'mit', 'svt', 'timm vit', 'timm swin'),
        'timm convnext',
    )
]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@functools.cache
def built(tuner, trunk):
    return ours_and_stock(trunk, tuner=TUNERS[tuner])


def copies(tuner, trunk):
    return copy.deepcopy(built(tuner, trunk))


@functools.cache
def facts(trunk):
    """Names of stock parameters that a loss on the outputs reaches.

    And of buffers that the stock forward itself rewrites.
    """
    stock = build_stock(trunk).requires_grad_()
    before = {k: v.clone() for k, v in stock.named_buffers()}
    loss_of(stock(image_for(trunk))).backward()
    reached = {
        name
        for name, p in stock.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    return reached, {
        name
        for name, value in stock.named_buffers()
        if not torch.equal(value, before[name])
    }


def declared(tuner, ours):
    """Names that should train, by a rule of this test's own."""
    names = {name for name, _ in ours.named_parameters()}
    if tuner == 'norm':
        return {
            f'{path}.{name}'
            for path, module in ours.named_modules()
            if isinstance(module, NORMS)
            for name, _ in module.named_parameters()
        }
    last = ours.trunk.body()[-1][0]
    rules = {
        'full': lambda name: True,
        'bitfit': lambda name: name.endswith(('.bias', '_bias')),
        'partial': lambda name: name.startswith(f'{last}.'),
    }
    rule = rules.get(tuner, lambda name: name.startswith('petl.'))
    return set(filter(rule, names))


@pytest.mark.parametrize('tuner, trunk', PAIRS)
def test_begins_as_the_stock_backbone(tuner, trunk):
    ours, stock = copies(tuner, trunk)
    image = image_for(trunk)
    with torch.no_grad():
        found = flat(ours.eval()(image))
    expected = stock_outputs(trunk, stock, image)
    if trunk == 'timm swin':
        expected = [e.permute(0, 2, 3, 1) for e in expected]  # as timm's
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('tuner, trunk', PAIRS)
def test_declared_parameters_and_no_others_train(tuner, trunk):
    ours = wake(copies(tuner, trunk)[0]).train()
    for module in ours.modules():
        if isinstance(module, DropPath):  # may leave out a whole branch
            module.eval()
    trains = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(trains) == declared(tuner, ours)
    loss = loss_of(ours(image_for(trunk)))
    if tuner == 'frozen':
        assert not trains and not loss.requires_grad
        return
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    loss.backward()
    reached, rewritten = facts(trunk)
    for name, parameter in trains.items():
        if name in reached or name.startswith('petl.'):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    torch.optim.SGD(ours.parameters(), 0.1).step()
    moved = {
        name
        for name, value in ours.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved & set(trains)
    if tuner == 'full':  # which has batch norms in training mode, too
        rewritten = {name for name, _ in ours.named_buffers()}
    assert moved - rewritten <= set(trains)


@pytest.mark.parametrize('trunk', ['swin of mmdet', 'dinov2'])
@pytest.mark.parametrize('tuner', TUNERS)
def test_states_and_copies_hold_all_of_it(tuner, trunk):
    first = wake(copies(tuner, trunk)[0]).eval()
    second = build_ours(trunk, tuner=TUNERS[tuner]).eval()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = copy.deepcopy(first)
    image = image_for(trunk)
    with torch.no_grad():
        before = flat(first(image))
        for other in (second, third):
            for a, b in zip(before, flat(other(image)), strict=True):
                assert torch.equal(a, b)
            own = other.tuner if tuner in INSIDE else other
            for parameter in own.parameters():
                parameter.add_(0.5)
            assert not torch.equal(before[-1], flat(other(image))[-1])
            for a, b in zip(before, flat(first(image)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize('trunk', ['swin of mmdet', 'dinov2'])
@pytest.mark.parametrize('tuner', TUNERS)
def test_autocast_to_bf16_is_finite(tuner, trunk):
    ours = wake(copies(tuner, trunk)[0]).train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(ours(image_for(trunk)))
    assert torch.isfinite(loss)
    if tuner != 'frozen':
        loss.backward()
        gradients = [p.grad for p in ours.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('kind', ['Adapter', 'AdaptFormer', 'LoRand', 'Mona'])
def test_what_no_weight_can_hold_does_not_merge(kind):
    with pytest.raises(ConfigError, match=f'{kind} adds computations that no'):
        build(kind).merge()


@pytest.mark.parametrize(
    'kind', ['Full', 'Frozen', 'Fixed', 'BitFit', 'NormTuning', 'Partial']
)
def test_what_is_in_the_stock_weights_is_merged_already(kind):
    ours = build(kind)
    image = torch.randn(IMAGE, dtype=torch.float64)
    before = ours(image)[0]
    ours.merge()
    assert torch.equal(ours(image)[0], before)


@pytest.mark.parametrize(
    'kind, options, message',
    [
        ('LoRA', dict(rank=0), '`tuner.rank` should be a whole number from 1'),
        ('LoRA', dict(alpha='a'), '`tuner.alpha` should be a number, or None'),
        ('LoRA', dict(parts=('x',)), '`tuner.parts` should be a list of some'),
        ('LoRA', dict(parts=()), '`tuner.parts` should be a list of some of'),
        ('LoRA', dict(parts=5), '`tuner.parts` should be a list of some of'),
        ('LoRA', dict(layers=None), '`tuner.layers` should be a list of name'),
        ('LoRA', dict(layers='qkv'), '`tuner.layers` should be a list of na'),
        ('LoRA', dict(layers=('qkv', 'fc9')), 'names fc9, but no block has'),
        ('LoRA', dict(layers=('nope',)), 'Expected linear layers named nope'),
        ('Adapter', dict(bottleneck=1.5), '`tuner.bottleneck` should be a wh'),
        ('AdaptFormer', dict(scale=True), '`tuner.scale` should be a number'),
        ('AdaptFormer', dict(branches=('x',)), 'Expected a branch named by'),
        ('AdaptFormer', dict(branches=5), '`tuner.branches` should be a list'),
        ('AdaptFormer', dict(branches=('attn', 'fnn')), 'names fnn, but no'),
        ('BitFit', dict(position_tables='no'), 'should be True or False, but'),
        ('LoRand', dict(rank=-1), '`tuner.rank` should be a whole number'),
        ('LoRand', dict(branches=0), '`tuner.branches` should be a whole'),
        ('Mona', dict(dropout=1), '`tuner.dropout` should be a number from 0'),
        ('Partial', dict(blocks=2), 'from 1 to the 1 blocks of Swin'),
        (
            'Full',
            dict(blocks=1),
            '`tuner.blocks` is unknown. Options are none',
        ),
        ('BitFit', dict(nope=1), '`tuner.nope` is unknown. Options are posit'),
    ],
)
def test_impossible_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


@pytest.mark.parametrize(
    'tuner', ['lora', 5, dict(type='e3va_mm.SimpleFeaturePyramid')]
)
def test_a_tuner_is_a_config(tuner):
    config = dict(TRUNK, type='e3va_mm.E3VASwinTransformer', tuner=tuner)
    with pytest.raises(ConfigError, match='`(backbone.)?tuner'):
        MODELS.build(config)
