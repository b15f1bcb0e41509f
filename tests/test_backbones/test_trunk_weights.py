"""Weights are stored when they arrive; files keep them as they came."""

import copy
import importlib.util
import os
import pickle
import tempfile

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint, save_checkpoint
from mmengine.runner.checkpoint import get_state_dict
from torch import nn

from e3va_mm.backbones import trunk_weights
from e3va_mm.errors import CheckpointError
from e3va_mm.measure import LiveBytes
from e3va_mm.measure.kept import kept_for_backward
from e3va_mm.utils import count_parameters
from tests.helpers import (
    Detector,
    assert_same_state,
    build_e3va,
    build_stock,
    e3va_and_stock,
    randomised,
)

IMAGE = (1, 3, 75, 50)
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)
needs_torchao = pytest.mark.skipif(
    not importlib.util.find_spec('torchao'), reason='needs torchao'
)
every_kind = pytest.mark.parametrize(
    'kind', [*DTYPES, pytest.param('int8', marks=needs_torchao)]
)


def lean(kind='bf16', **kwargs):
    tuner = dict(preset='lean', trunk_weights=kind)
    return build_e3va(tuner=tuner, **kwargs)


@pytest.fixture
def loaded():
    """Makes a backbone with a stored trunk, and the state that came."""

    def make(kind='bf16'):
        ours, source = lean(kind), randomised(build_e3va()).state_dict()
        ours.load_state_dict(copy.deepcopy(source))
        return ours, source

    return make


def outputs(backbone, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return backbone(torch.randn(IMAGE, generator=generator))


def assert_outputs(ours, expected):
    for one, other in zip(outputs(ours), expected, strict=True):
        assert torch.equal(one, other)


def tensors(backbone):
    """Names, types and identities of all that a backbone holds."""
    both = [*backbone.named_parameters(), *backbone.named_buffers()]
    return {name: (id(v), v.dtype, v._version) for name, v in both}


def linear_layers(backbone):
    """Weights and biases of the linear layers in the stages, by name."""
    return {
        f'{path}.{name}': getattr(module, name)
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and path.startswith('stages')
        for name in ('weight', 'bias')
        if getattr(module, name) is not None
    }


# -- storing -----------------------------------------------------------------


@every_kind
def test_weights_are_stored_when_they_are_loaded(kind, loaded):
    """In a known number of bytes, and no forward changes any."""
    exact = LiveBytes(build_e3va()).now['weights']
    ours, _ = loaded(kind)
    saved = exact - LiveBytes(ours).now['weights']
    layers = linear_layers(ours)
    assert len(layers) == 2 * 6 * 4 + 3  # mergings have no bias
    if kind == 'int8':  # a scale, and perhaps a zero point, of each channel
        weights = [v for name, v in layers.items() if name.endswith('weight')]
        values = sum(value.numel() for value in weights)
        channels = sum(len(value) for value in weights)
        assert 3 * values - 8 * channels <= saved < 3 * values
    else:
        assert saved == 2 * sum(value.numel() for value in layers.values())
        for name, value in ours.named_parameters():
            coarse = name in layers
            assert value.dtype is (DTYPES[kind] if coarse else torch.float32)
    before = tensors(ours)
    for mode in (True, False):
        ours.train(mode)
        outputs(ours)
        assert tensors(ours) == before


def test_what_trains_does_not_depend_on_the_preset(loaded):
    ours, _ = loaded()
    assert count_parameters(ours) == count_parameters(build_e3va())
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


@every_kind
def test_lean_is_close_to_exact(kind):
    """bf16 products to 1 %; 8 bits of weights add 1/254 of the largest."""
    exact, stock = e3va_and_stock()
    ours = lean(kind)
    ours.load_state_dict(stock.state_dict(), strict=False)
    for one, other in zip(outputs(ours), outputs(exact), strict=True):
        error = (one - other).norm() / other.norm()
        assert 1e-4 < error < (0.05 if kind == 'int8' else 0.02)


def test_lean_keeps_a_quarter_of_the_taps():
    """And of each token a scale and a projection; output maps stay."""
    image = torch.randn(1, 3, 128, 128)
    exact, ours = (
        kept_for_backward(build_e3va(tuner=dict(preset=preset)), image)
        for preset in ('exact', 'lean')
    )
    # Two taps a block; tokens, channels and blocks of the stages.
    stages = [(1024, 32, 2), (256, 64, 1), (64, 128, 2), (16, 256, 1)]
    taps = sum(2 * n * c * depth for n, c, depth in stages)
    rows = sum(2 * n * depth for n, c, depth in stages)
    # A quarter of the bytes; a scale and a projection of rank 16 a token.
    saved = 4 * taps - (taps + rows * (4 + 16 * 4))
    assert exact - ours >= 0.9 * saved


@every_kind
@pytest.mark.parametrize('guard', [torch.no_grad, torch.inference_mode])
def test_inference_and_then_training(kind, guard, loaded):
    if kind == 'int8' and guard is torch.inference_mode:
        pytest.skip("torchao's tensors do not know the inference mode")
    ours, _ = loaded(kind)
    image = torch.randn(IMAGE)
    with guard():
        first, again = ours.eval()(image), ours(image)
    for one, other in zip(first, again, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)
    ours.train()(image)[3].square().mean().backward()
    assert ours.norm3.weight.grad.isfinite().all()


# -- files -------------------------------------------------------------------


@every_kind
def test_checkpoints_hold_the_weights_that_came(kind, loaded, tmp_path):
    ours, source = loaded(kind)
    assert_same_state(ours.state_dict(), source)
    path = str(tmp_path / 'epoch_1.pth')
    state = get_state_dict(Detector(ours))
    save_checkpoint(dict(state_dict=state), path)
    saved = torch.load(path, weights_only=True)['state_dict']
    expected = {f'backbone.{key}': value for key, value in source.items()}
    neck = {key: saved[key] for key in ('neck.weight', 'neck.bias')}
    assert_same_state(saved, {**expected, **neck})
    # Any model takes them, whatever it stores; more than once.
    exact = build_e3va()
    load_checkpoint(Detector(exact), path)
    assert_same_state(exact.state_dict(), source)
    for other_kind in {'bf16', kind}:
        other = lean(other_kind)
        for _ in range(2):
            load_checkpoint(Detector(other), path)
            assert_same_state(other.state_dict(), source)
    assert_outputs(other, outputs(loaded(other_kind)[0]))


@every_kind
def test_training_changes_neither_what_is_stored_nor_what_came(kind, loaded):
    ours, source = loaded(kind)
    names = {n for n, p in ours.named_parameters() if p.requires_grad}

    def stored():
        held = [*ours.named_parameters(), *ours.named_buffers()]
        return pickle.dumps([v for n, v in held if n not in names])

    before = stored()
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.5)
    wrapper = build_optim_wrapper(ours, dict(optimizer=optimizer))
    for _ in range(3):
        found = ours(torch.randn(IMAGE))
        wrapper.update_params(sum(o.square().mean() for o in found))
    assert stored() == before
    for name, value in ours.state_dict().items():
        assert value.dtype is source[name].dtype
        assert torch.equal(value, source[name]) == (name not in names), name


@every_kind
def test_other_weights_can_be_loaded_at_any_time(kind, loaded):
    ours, source = loaded(kind)
    for seed in (5, 6):
        new = randomised(build_e3va(), seed).state_dict()
        ours.load_state_dict(new)
        assert_same_state(ours.state_dict(), new)
        fresh = lean(kind)
        fresh.load_state_dict(new)
        assert_outputs(ours, outputs(fresh))
    # The trunk alone, as from a stock detector; then what trains alone.
    stock = randomised(build_stock(), seed=7).state_dict()
    ours.load_state_dict(stock, strict=False)
    expected = {**new, **stock}
    assert_same_state(ours.state_dict(), expected)
    alone = {k: v for k, v in source.items() if k.startswith(('side', 'norm'))}
    ours.load_state_dict(alone, strict=False)
    expected |= alone
    assert_same_state(ours.state_dict(), expected)
    fresh.load_state_dict(expected)
    assert_outputs(ours, outputs(fresh))


@every_kind
@pytest.mark.parametrize('fault', ['missing', 'shape', 'unexpected'])
def test_a_failed_load_changes_nothing(kind, fault, loaded):
    ours, source = loaded(kind)
    before, held = outputs(ours), tensors(ours)
    state = randomised(build_e3va(), seed=9).state_dict()
    name = 'stages.2.blocks.1.attn.w_msa.qkv.weight'
    if fault == 'missing':
        del state[name]
    elif fault == 'shape':
        state[name] = state[name][:-1]
    else:
        state['stages.2.blocks.7.norm1.weight'] = torch.ones(128)
    with pytest.raises(CheckpointError, match='does not fit the backbone'):
        ours.load_state_dict(state, strict=False)
    assert tensors(ours) == held
    assert_same_state(ours.state_dict(), source)
    assert_outputs(ours, before)


# -- copies, ranks and disks -------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
)
def test_copies_have_weights_and_source_of_their_own(kind, copied, loaded):
    ours, source = loaded(kind)
    before = outputs(ours)
    twin = copied(ours)
    assert_outputs(twin, before)
    assert_same_state(twin.state_dict(), source)
    new = randomised(build_e3va(), seed=9).state_dict()
    twin.load_state_dict(new)
    assert not torch.allclose(outputs(twin)[0], before[0], atol=1e-2)
    assert_same_state(twin.state_dict(), new)
    assert_same_state(ours.state_dict(), source)
    assert_outputs(ours, before)


@every_kind
def test_a_random_trunk_is_stored_too(kind):
    ours = lean(kind)
    ours.init_weights()
    coarse = lean(kind)
    coarse.load_state_dict(ours.state_dict())
    before = tensors(ours)
    outputs(ours)
    assert tensors(ours) == before
    assert LiveBytes(ours).now == LiveBytes(coarse).now


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_no_room_for_what_came(monkeypatch, loaded):
    """The error comes before anything is loaded, and can be mended."""
    ours, source = loaded()
    held = tensors(ours)
    new = randomised(build_e3va(), seed=9).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(
            tempfile, 'TemporaryFile', lambda: open('/dev/full', 'wb')
        )
        with pytest.raises(CheckpointError, match='TMPDIR'):
            ours.load_state_dict(new)
    assert tensors(ours) == held
    ours.load_state_dict(new)
    assert_same_state(ours.state_dict(), new)


def test_other_processes_need_no_room(monkeypatch, loaded):
    """Only the main process writes checkpoints."""
    monkeypatch.setattr(trunk_weights, 'is_main_process', lambda: False)
    monkeypatch.setattr(tempfile, 'TemporaryFile', None)  # not called
    ours, source = loaded()
    before = outputs(ours)
    state = ours.state_dict()
    for name, value in state.items():
        assert value.dtype is source[name].dtype
        torch.testing.assert_close(value, source[name], rtol=1e-2, atol=0)
    # Loaded again they are rounded no further.
    ours.load_state_dict(state)
    assert_outputs(ours, before)


def test_other_processes_know_the_trunk_that_came(monkeypatch, loaded):
    """Else they alone would read it again, and wait for the main process."""
    known, _ = loaded()
    expected = known.trunk_fingerprint()
    monkeypatch.setattr(trunk_weights, 'is_main_process', lambda: False)
    ours, _ = loaded()
    assert ours.trunk_fingerprint() == expected
    ours.load_state_dict(randomised(build_e3va(), seed=9).state_dict())
    assert ours.trunk_fingerprint() != expected


def test_what_came_takes_no_memory(loaded):
    ours, _ = loaded()
    held = [*ours.parameters(), *ours.buffers()]
    assert LiveBytes(ours).now['weights'] == sum(v.nbytes for v in held)
