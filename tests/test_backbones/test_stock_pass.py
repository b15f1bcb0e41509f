"""With its tuner off, a backbone gives what the stock one gives."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.errors import ConfigError
from e3va_mm.weights import adapter_of, read_checkpoint, trunk_records
from tests.helpers import (
    Detector,
    build_e3va,
    build_stock,
    e3va_and_stock,
    randomised,
)
from tests.test_backbones.test_tuned import ALL, build, image_of
from tests.trunk_cases import awake, flat

CHANGES_STOCK = ('Full', 'BitFit', 'NormTuning', 'Partial')
LEAN = dict(type='E3VA', rank=4, preset='lean')
IMAGE = (2, 3, 75, 50)


def trained(ours, seed=1):
    """As after training: adapters awake, other norms."""
    generator = torch.Generator().manual_seed(seed)
    awake(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    return ours.eval()


@torch.no_grad()
def assert_stock(ours, stock, image, off=True):
    ours.tuner.enabled = not off
    found, expected = flat(ours(image)), flat(stock(image))
    same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert all(same) if off else not any(same)
    ours.tuner.enabled = True


@pytest.mark.parametrize('trunk, kind', ALL)
def test_off_is_stock_bit_for_bit(trunk, kind):
    ours, stock = build(trunk, kind)
    trained(ours)
    image = image_of(trunk)
    if kind in CHANGES_STOCK:
        ours.tuner.enabled = False
        with pytest.raises(ConfigError, match=f'{kind} changes weights'):
            ours(image)
        return
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        on = flat(ours(image))
        assert_stock(ours, stock, image)
        again = flat(ours(image))
    assert all(map(torch.equal, on, again))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    if kind not in ('Frozen',):
        assert_stock(ours, stock, image, off=False)


def test_off_has_the_weights_that_came_not_those_that_are_stored():
    ours, stock = e3va_and_stock(tuner=LEAN)
    assert_stock(trained(ours), stock, torch.randn(IMAGE))


def test_off_beside_others_on_one_trunk():
    one, stock = e3va_and_stock(tuner=dict(rank=4))
    trained(one)
    other = trained(build_e3va(tuner=dict(rank=4)), seed=2)
    other.share_trunk(one)
    image = torch.randn(IMAGE)
    rows = [slice(0, 1), slice(1, 2)]
    with torch.no_grad():
        on = run_trunk([one, other], image, rows)
        other.tuner.enabled = False
        alone, off = run_trunk([one, other], image, rows)
        expected = stock(image[1:])
    assert all(map(torch.equal, off, expected))
    assert all(map(torch.equal, alone, on[0]))
    assert not torch.equal(on[1][0], off[0])


@pytest.mark.parametrize('named', ['load_from', 'init_cfg'])
def test_an_adapter_file_brings_the_stock_norms(tmp_path, named):
    """From the detector that its trunk came with; a classifier has none."""
    stock = Detector(randomised(build_stock()))
    path = tmp_path / 'stock.safetensors'
    content = stock if named == 'load_from' else stock.backbone
    state = {
        key: value
        for key, value in content.state_dict().items()
        if named == 'load_from' or not key.startswith('norm')
    }
    save_file(state, path)
    model = Detector(build_e3va(tuner=dict(rank=4)))
    model.backbone.load_state_dict(
        read_checkpoint(path)['state_dict']
        if named == 'init_cfg'
        else stock.backbone.state_dict(),
        strict=False,
    )
    trained(model.backbone)
    adapter = tmp_path / 'adapter.safetensors'
    records = trunk_records(model, {'backbone.': str(path)})
    adapter_of(model, records).write(adapter)

    fresh = Detector(build_e3va(tuner=dict(rank=4)))
    fresh.load_state_dict(read_checkpoint(adapter)['state_dict'])
    expected = build_stock()
    expected.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in state.items()}
        if named == 'init_cfg'
        else stock.backbone.state_dict(),
        strict=False,
    )
    expected.eval()  # which returns nothing
    assert_stock(fresh.backbone.eval(), expected, torch.randn(IMAGE))


def test_a_checkpoint_of_ours_does_not_tell_them():
    ours, stock = e3va_and_stock(tuner=dict(rank=4))
    state = copy.deepcopy(trained(ours).state_dict())
    fresh = build_e3va(tuner=dict(rank=4)).eval()
    image = torch.randn(IMAGE)
    fresh.load_state_dict(state)
    fresh.tuner.enabled = False
    with pytest.raises(ConfigError, match='norm0.*are not known'):
        fresh(image)
    # As the message says.
    fresh.load_state_dict(stock.state_dict(), strict=False)
    fresh.load_state_dict(state)
    assert_stock(fresh, stock, image)


def test_in_training_nothing_receives_a_gradient():
    ours, stock = e3va_and_stock(tuner=dict(rank=4))
    trained(ours).train()
    ours.tuner.enabled = False
    outputs = ours(torch.randn(IMAGE))
    assert not any(each.requires_grad for each in outputs)
