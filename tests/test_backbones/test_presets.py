"""Presets, and what the lean one promises."""

import copy
import importlib.util
import os
import pickle
import sys
import tempfile

import pytest
import torch
from mmengine import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint, save_checkpoint
from mmengine.runner.checkpoint import get_state_dict
from torch import nn

from e3va_mm.backbones.presets import PRESETS, resolve_side_path
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.measure import LiveBytes
from e3va_mm.measure.kept import kept_for_backward
from e3va_mm.numerics.stored_weights import coarse_keys
from e3va_mm.trunks import TrunkOptions
from e3va_mm.utils import count_parameters
from tests.helpers import build_e3va, build_stock, e3va_and_stock, randomised

IMAGE = (1, 3, 75, 50)
LEAN = dict(preset='lean')
needs_torchao = pytest.mark.skipif(
    not importlib.util.find_spec('torchao'), reason='needs torchao'
)
KINDS = ['bf16', 'fp16', pytest.param('int8', marks=needs_torchao)]
every_kind = pytest.mark.parametrize('kind', KINDS)


class Detector(nn.Module):
    """As much of a detector as loading and saving see."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(2, 2)


@pytest.mark.parametrize('side_path', [None, {}, dict(preset='exact')])
def test_exact_is_the_default_and_changes_nothing(side_path):
    assert resolve_side_path(side_path) == ({}, TrunkOptions())


def test_lean_is_taps_in_4_bits_and_products_in_16():
    side_path, options = resolve_side_path(LEAN)
    assert side_path == dict(save_taps=('recompute', 'int4'), compute='bf16')
    assert options == TrunkOptions(compute='bf16', weights='bf16')


def test_own_options_come_before_those_of_the_preset():
    given = ConfigDict(
        preset='lean', rank=8, save_taps='bf16', trunk_compute='fp16',
        trunk_weights=None, trunk_chunk=64,
    )  # fmt: skip
    side_path, options = resolve_side_path(given)
    assert side_path == dict(rank=8, save_taps='bf16', compute='bf16')
    assert options == TrunkOptions(compute='fp16', weights=None, chunk=64)
    assert given.preset == 'lean'  # a config is used again


def test_presets_do_not_change():
    before = copy.deepcopy(PRESETS)
    resolve_side_path(dict(LEAN, trunk_compute='fp16'))
    assert before == PRESETS


@pytest.mark.parametrize('preset', ['Lean', '', None, 8, ['lean']])
def test_unknown_presets_are_refused(preset):
    with pytest.raises(ConfigError) as error:
        build_e3va(side_path=dict(preset=preset))
    assert str(error.value) == (
        "`side_path.preset` should be one of ('exact', 'lean'), but got "
        f'{preset!r}.'
    )


@pytest.mark.parametrize('side_path', ['lean', ['lean'], True])
def test_a_side_path_is_a_dict(side_path):
    with pytest.raises(ConfigError) as error:
        build_e3va(side_path=side_path)
    assert str(error.value) == (
        "`backbone.side_path` should be a dict, such as dict(preset='lean'), "
        f'but got {side_path!r}.'
    )


@pytest.mark.parametrize(
    'option, message',
    [
        (dict(trunk_dtype='bf16'), '`side_path.trunk_dtype` is no option'),
        (dict(trunk_weights='int4'), '`side_path.trunk_weights` should be'),
        (dict(rang=8), 'rang'),
    ],
)
@pytest.mark.parametrize('preset', PRESETS)
def test_options_are_checked_with_any_preset(preset, option, message):
    with pytest.raises(ConfigError, match=message):
        build_e3va(side_path=dict(preset=preset, **option))


def test_a_random_trunk_cannot_run_twice():
    with pytest.raises(ConfigError) as error:
        build_e3va(side_path=dict(save_taps='recompute', trunk_drop_path=0.2))
    text = str(error.value)
    assert "`side_path.save_taps='recompute'` runs the trunk twice" in text
    assert '`side_path.trunk_drop_path` is 0.2' in text
    assert 'leave out the drop path' in text
    build_e3va(side_path=dict(save_taps='recompute', trunk_drop_path=0.0))
    # The preset can do without.
    side_path, _ = resolve_side_path(dict(LEAN, trunk_drop_path=0.2))
    assert side_path == dict(save_taps='int4', compute='bf16')


def test_a_missing_torchao_is_said_when_the_model_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    build_e3va(side_path=LEAN)
    with pytest.raises(ConfigError, match='`pip install torchao`'):
        build_e3va(side_path=dict(LEAN, trunk_weights='int8'))


def body_values(backbone):
    """Values of weights and of biases in the linear layers of the stages."""
    layers = [
        module
        for module in backbone.stages.modules()
        if isinstance(module, nn.Linear)
    ]
    return (
        sum(layer.weight.numel() for layer in layers),
        sum(layer.bias.numel() for layer in layers if layer.bias is not None),
        sum(layer.out_features for layer in layers),
    )


def lean(kind='bf16', **kwargs):
    """A backbone of which the trunk is stored already, and its source."""
    ours, stock = e3va_and_stock(
        side_path=dict(LEAN, trunk_weights=kind), **kwargs
    )
    randomised(ours.side_path, seed=1)
    source = {name: v.clone() for name, v in ours.state_dict().items()}
    with torch.no_grad():
        ours(torch.randn(IMAGE))
    return ours, stock, source


def assert_state(state, expected):
    """The same names in the same order, types and bits."""
    assert list(state) == list(expected)
    for name, value in state.items():
        assert type(value) is torch.Tensor, name
        assert value.dtype is expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def assert_outputs(ours, other, image):
    with torch.no_grad():
        for a, b in zip(ours(image), other(image), strict=True):
            assert torch.equal(a, b)


@every_kind
def test_what_is_stored_and_in_how_many_bytes(kind):
    ours, _ = e3va_and_stock(side_path=dict(LEAN, trunk_weights=kind))
    sizes = {name: p.numel() for name, p in ours.named_parameters()}
    before = LiveBytes(ours).now['weights']
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours(torch.randn(IMAGE))
    weights, biases, channels = body_values(ours)
    saved = before - LiveBytes(ours).now['weights']
    if kind == 'int8':  # a scale, and perhaps a zero point, of each channel
        assert 3 * weights - 8 * channels <= saved <= 3 * weights
        assert saved < 3 * weights
    else:
        assert saved == 2 * (weights + biases)
        dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[kind]
        coarse = {f'stages.{k}' for k in coarse_keys(ours.stages, kind)}
        for name, parameter in ours.named_parameters():
            expected = dtype if name in coarse else torch.float32
            assert parameter.dtype is expected, name
        assert len(coarse) == 6 * 8 + 3  # blocks, and mergings without bias
    assert {n: p.numel() for n, p in ours.named_parameters()} == sizes


def test_what_trains_does_not_depend_on_the_preset():
    counts = {}
    for preset in PRESETS:
        ours, _ = e3va_and_stock(side_path=dict(preset=preset))
        counts[preset] = [count_parameters(ours)]
        ours(torch.randn(IMAGE))
        counts[preset].append(count_parameters(ours))
        assert all(
            parameter.dtype is torch.float32
            for parameter in ours.parameters()
            if parameter.requires_grad
        )
    total, trainable = counts['exact'][0]
    assert 0 < trainable < total
    assert counts['exact'] == counts['lean'] == [(total, trainable)] * 2


@every_kind
def test_lean_is_close_to_exact(kind):
    """bf16 products to 1 %; 8 bits of weights add 1/254 of the largest."""
    ours, stock, _ = lean(kind)
    nn.init.zeros_(ours.side_path.stages[0][0].attn.up.q)
    exact = build_e3va()
    exact.load_state_dict(ours.state_dict())
    image = torch.randn(IMAGE)
    with torch.no_grad():
        for output, expected in zip(ours(image), exact(image), strict=True):
            error = (output - expected).norm() / expected.norm()
            assert 1e-4 < error < (0.05 if kind == 'int8' else 0.02)


def test_lean_keeps_a_quarter_of_the_taps():
    """And of each token a scale and a projection; output maps stay."""
    kept = {}
    for preset in PRESETS:
        ours, _ = e3va_and_stock(side_path=dict(preset=preset))
        image = torch.randn(1, 3, 128, 128)
        ours(image)
        kept[preset] = kept_for_backward(ours, image)
    # Two taps a block; tokens and channels of the stages of `TINY`.
    stages = [(1024, 32, 2), (256, 64, 1), (64, 128, 2), (16, 256, 1)]
    taps = sum(2 * n * c * depth for n, c, depth in stages)
    rows = sum(2 * n * depth for n, c, depth in stages)
    # A quarter of the bytes; a scale and a projection of rank 16 a token.
    saved = 4 * taps - (taps + rows * (4 + 16 * 4))
    assert kept['exact'] - kept['lean'] >= 0.9 * saved


@pytest.mark.parametrize(
    'kind, guard',
    [
        *((kind, torch.no_grad) for kind in ('bf16', 'fp16')),
        pytest.param('int8', torch.no_grad, marks=needs_torchao),
        # torchao's tensors do not know the inference mode.
        *((kind, torch.inference_mode) for kind in ('bf16', 'fp16')),
    ],
)
def test_inference(kind, guard):
    ours, _ = e3va_and_stock(side_path=dict(LEAN, trunk_weights=kind))
    ours.eval()
    image = torch.randn(IMAGE)
    with guard():
        first, again = ours(image), ours(image)
    for a, b in zip(first, again, strict=True):
        assert not a.requires_grad and a.isfinite().all()
        assert torch.equal(a, b)
    # Training goes on after it.
    ours.train()
    sum(output.square().mean() for output in ours(image)).backward()
    assert ours.norm3.weight.grad.isfinite().all()


@every_kind
def test_the_source_is_what_a_state_dict_holds(kind, tmp_path):
    ours, stock, source = lean(kind)
    for name, value in stock.state_dict().items():
        assert torch.equal(source[name], value)
    assert_state(ours.state_dict(), source)
    detector = Detector(ours)
    path = tmp_path / 'epoch_1.pth'
    save_checkpoint(dict(state_dict=get_state_dict(detector)), str(path))
    saved = torch.load(path, weights_only=True)['state_dict']
    for state in (get_state_dict(detector), detector.state_dict(), saved):
        of_backbone = {
            name.removeprefix('backbone.'): value
            for name, value in state.items()
            if name.startswith('backbone.')
        }
        assert_state(of_backbone, source)
        assert len(state) == len(source) + 2


@every_kind
def test_training_does_not_change_the_source_by_one_bit(kind):
    ours, _, source = lean(kind)
    stored = pickle.dumps(
        [p for p in ours.parameters() if not p.requires_grad]
    )
    wrapper = build_optim_wrapper(
        ours,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.5),
        ),
    )
    for _ in range(3):
        outputs = ours(torch.randn(IMAGE))
        wrapper.update_params(sum(o.square().mean() for o in outputs))
    state = ours.state_dict()
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert any(name.startswith('side_path.') for name in trains)
    for name, value in state.items():
        assert value.dtype is source[name].dtype
        assert torch.equal(value, source[name]) == (name not in trains), name
    now = pickle.dumps([p for p in ours.parameters() if not p.requires_grad])
    assert now == stored


@every_kind
def test_a_lean_checkpoint_brings_the_source_into_any_model(kind, tmp_path):
    ours, _, source = lean(kind)
    path = str(tmp_path / 'lean.pth')
    save_checkpoint(dict(state_dict=get_state_dict(Detector(ours))), path)
    exact = build_e3va()
    load_checkpoint(Detector(exact), path)
    assert_state(exact.state_dict(), source)
    for other_kind in {'bf16', 'fp16', kind}:
        other = build_e3va(side_path=dict(LEAN, trunk_weights=other_kind))
        for _ in range(2):  # before its first forward pass and after it
            load_checkpoint(Detector(other), path)
            with torch.no_grad():
                other(torch.randn(IMAGE))
            assert_state(other.state_dict(), source)
    twin = build_e3va(side_path=dict(LEAN, trunk_weights=kind))
    load_checkpoint(Detector(twin), path)
    assert_outputs(twin, ours, torch.randn(IMAGE))


@every_kind
def test_other_weights_can_be_loaded_at_any_time(kind):
    ours, _, source = lean(kind)
    image = torch.randn(IMAGE)
    for seed in (5, 6):
        new = randomised(build_e3va(), seed)
        ours.load_state_dict(new.state_dict())
        assert_state(ours.state_dict(), new.state_dict())
        fresh = build_e3va(side_path=dict(LEAN, trunk_weights=kind))
        fresh.load_state_dict(new.state_dict())
        assert_outputs(ours, fresh, image)
        assert_state(ours.state_dict(), new.state_dict())
    ours.load_state_dict(source)
    assert_state(ours.state_dict(), source)
    assert {type(p) for p in ours.parameters()} == {nn.Parameter}


@every_kind
def test_a_whole_stock_detector_as_load_from(kind, tmp_path):
    ours, _, source = lean(kind)
    stock = randomised(build_stock(), seed=7)
    path = str(tmp_path / 'stock.pth')
    torch.save(dict(state_dict=Detector(stock).state_dict()), path)
    load_checkpoint(Detector(ours), path)
    with torch.no_grad():
        ours(torch.randn(IMAGE))
    expected = {**source, **stock.state_dict()}
    assert_state(ours.state_dict(), {k: expected[k] for k in source})


@every_kind
def test_a_side_path_alone_leaves_the_trunk_as_it_was(kind):
    ours, _, source = lean(kind)
    other = randomised(build_e3va(), seed=9).state_dict()
    alone = {
        name: value
        for name, value in other.items()
        if name.startswith(('side_path.', 'norm'))
    }
    ours.load_state_dict(alone, strict=False)
    expected = {**source, **alone}
    assert_state(ours.state_dict(), expected)
    fresh = build_e3va(side_path=dict(LEAN, trunk_weights=kind))
    fresh.load_state_dict(expected)
    assert_outputs(ours, fresh, torch.randn(IMAGE))
    assert_state(ours.state_dict(), expected)


@every_kind
@pytest.mark.parametrize('fault', ['missing', 'shape', 'unexpected'])
def test_a_failed_load_changes_nothing(kind, fault):
    ours, _, source = lean(kind)
    image = torch.randn(IMAGE)
    with torch.no_grad():
        before = ours(image)
    sizes = LiveBytes(ours).now['weights']
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
    assert LiveBytes(ours).now['weights'] == sizes
    assert_state(ours.state_dict(), source)
    with torch.no_grad():
        for a, b in zip(ours(image), before, strict=True):
            assert torch.equal(a, b)


@every_kind
@pytest.mark.parametrize('copied', ['deepcopy', 'pickle'])
def test_copies_have_weights_and_source_of_their_own(kind, copied):
    ours, _, source = lean(kind)
    image = torch.randn(IMAGE)
    with torch.no_grad():
        before = ours(image)
    twin = (
        copy.deepcopy(ours)
        if copied == 'deepcopy'
        else pickle.loads(pickle.dumps(ours))
    )
    assert_outputs(twin, ours, image)
    assert_state(twin.state_dict(), source)
    new = randomised(build_e3va(), seed=9).state_dict()
    twin.load_state_dict(new)
    with torch.no_grad():
        assert not torch.allclose(twin(image)[0], before[0], atol=1e-2)
    assert_state(twin.state_dict(), new)
    assert_state(ours.state_dict(), source)
    with torch.no_grad():
        for a, b in zip(ours(image), before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    'kind', ['bf16', pytest.param('int8', marks=needs_torchao)]
)
def test_copies_made_before_the_first_forward_pass(kind):
    """As averaging hooks make them."""
    ours, _ = e3va_and_stock(side_path=dict(LEAN, trunk_weights=kind))
    source = copy.deepcopy(ours.state_dict())
    twin = copy.deepcopy(ours)
    image = torch.randn(IMAGE)
    assert_outputs(ours, twin, image)
    assert_state(ours.state_dict(), source)
    assert_state(twin.state_dict(), source)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_no_room_for_the_source(monkeypatch):
    """The error comes before anything is rounded, and can be mended."""
    ours, _ = e3va_and_stock(side_path=LEAN)
    source = copy.deepcopy(ours.state_dict())
    image = torch.randn(IMAGE)
    with monkeypatch.context() as patch:
        patch.setattr(
            tempfile, 'TemporaryFile', lambda: open('/dev/full', 'wb')
        )
        with pytest.raises(CheckpointError, match='TMPDIR'):
            ours(image)
        assert_state(ours.state_dict(), source)
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours(image)
    assert_state(ours.state_dict(), source)


def test_other_processes_need_no_room(monkeypatch):
    """Only the main process writes checkpoints."""
    monkeypatch.setattr(
        'e3va_mm.backbones.trunk_storage.is_main_process',
        lambda: False,
    )
    monkeypatch.setattr(tempfile, 'TemporaryFile', None)  # not called
    ours, _ = e3va_and_stock(side_path=LEAN)
    source = copy.deepcopy(ours.state_dict())
    image = torch.randn(IMAGE)
    with torch.no_grad():
        before = ours(image)
    # A side path alone, and the trunk is still the rounded one.
    alone = {k: v for k, v in source.items() if k.startswith(('side', 'norm'))}
    ours.load_state_dict(alone, strict=False)
    with torch.no_grad():
        for a, b in zip(ours(image), before, strict=True):
            assert torch.equal(a, b)
    # And weights as they come are rounded only once more.
    ours.load_state_dict(source)
    assert_state(ours.state_dict(), source)


def test_the_source_takes_no_memory():
    ours, _, _ = lean()
    weights, biases, _ = body_values(ours)
    values, _ = count_parameters(ours)
    buffers = sum(buffer.nbytes for buffer in ours.buffers())
    live = LiveBytes(ours).now['weights'] - buffers
    assert live == 4 * values - 2 * (weights + biases)
