"""The fused highway against plain autograd over the same adapters."""

from contextvars import ContextVar

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from e3va_mm.numerics import temporaries
from e3va_mm.numerics.products import fast_dtype
from e3va_mm.tuners.e3va import AdapterBank
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.tuners.e3va.replay import Replay

CHANNELS, RANK, TAPS, TOKENS = 24, 3, 4, 50
MODES = list(TAP_CODECS)


def adapters(dtype=torch.float64, taps=TAPS):
    bank = AdapterBank('abcd'[:taps], CHANNELS, RANK)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return bank.to(dtype)


def replay_of(taps):
    """A trunk whose one stage has these taps, and whose image they are."""

    def run(image, last, wanted, on_tap):
        assert last in wanted
        for tap in image:
            on_tap(last, tap.clone())

    return Replay(taps, run)


def fused(bank, taps, base, mode='exact', compute=None):
    codec = TAP_CODECS[mode]
    highway = Highway(bank, base, codec, replay_of(taps), compute=compute)
    for index, tap in enumerate(taps):
        highway.add(index, tap)
    return highway.sum()


def plain(bank, taps, base):
    total = bank(taps.flatten(1, 2)).sum(0).view(taps.shape[1:])
    return total if base is None else base + total


def inputs_of(bank, base):
    inputs = [*bank.parameters()]
    return inputs if base is None else [*inputs, base]


def bytes_kept(parts, mode):
    """Beside the parameters and the image, by storage."""
    image = torch.randn(TAPS, 2, TOKENS, CHANNELS)
    own = {t.untyped_storage().data_ptr() for t in inputs_of(parts, image)}
    # The taps of a trunk are not its image, and not each other's neighbours.
    taps = [tap.clone() for tap in image]
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    highway = Highway(parts, None, TAP_CODECS[mode], replay_of(image))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for index, tap in enumerate(taps):
            highway.add(index, tap)
        total = highway.sum()
    assert total.requires_grad
    return sum(n for pointer, n in kept.items() if pointer not in own)


def gradients(function, parts, taps, base, weight):
    total = function(parts, taps, base)
    return torch.autograd.grad((total * weight).sum(), inputs_of(parts, base))


def assert_same(got, expected, **tolerances):
    for gradient, target in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, target, **tolerances)


def relative_error(got, expected):
    return (got.double() - expected).norm() / expected.norm()


@pytest.fixture
def data():
    taps = torch.randn(TAPS, 2, TOKENS, CHANNELS, dtype=torch.float64)
    base = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64)
    return taps, base.requires_grad_(), torch.randn_like(base)


@pytest.mark.parametrize('mode', ['exact', 'recompute'])
def test_gradcheck_in_fp64(mode):
    parts = adapters(taps=2)
    taps = torch.randn(2, 1, 5, CHANNELS, dtype=torch.float64)
    base = torch.randn(1, 5, CHANNELS, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda *_: fused(parts, taps, base, mode), inputs_of(parts, base)
    )


@pytest.mark.parametrize('mode', ['exact', 'recompute'])
@pytest.mark.parametrize('with_base', [True, False])
@pytest.mark.parametrize('as_on_gpu', [False, True])
@pytest.mark.parametrize('room', [7 * 12 * 8, 230 * 12 * 8, 2**22])
def test_equals_plain_autograd(
    data, mode, with_base, as_on_gpu, room, monkeypatch
):
    """Some tokens of a tap at a time, some taps, or all."""
    monkeypatch.setattr(temporaries, 'CPU_BYTES', room)
    monkeypatch.setattr(temporaries, 'GPU_BYTES', room)
    if as_on_gpu:
        monkeypatch.setattr(
            temporaries, '_AS_ON_GPU', ContextVar('on', default=True)
        )
    taps, base, weight = data
    base = base if with_base else None
    parts = adapters()
    torch.testing.assert_close(
        fused(parts, taps, base, mode), plain(parts, taps, base)
    )
    got = gradients(
        lambda *args: fused(*args, mode), parts, taps, base, weight
    )
    assert_same(got, gradients(plain, parts, taps, base, weight))


def test_exact_in_fp32_is_within_1e5_of_fp64(data):
    taps, base, weight = data
    parts = adapters()
    expected = gradients(plain, parts, taps, base, weight)
    parts = parts.float()
    base = base.detach().float().requires_grad_()
    got = gradients(fused, parts, taps.float(), base, weight.float())
    for gradient, target in zip(got, expected, strict=True):
        assert relative_error(gradient, target) < 1e-5


def test_frozen_adapters_pass_the_gradient_on(data):
    taps, base, weight = data
    bank = adapters()
    bank.down.requires_grad_(False)
    fused(bank, taps, base).mul(weight).sum().backward()
    torch.testing.assert_close(base.grad, weight)
    assert all(p.grad is None for p in bank.down.parameters())
    assert all(p.grad.any() for p in bank.up.parameters())


# Largest relative error of a parameter's gradient.
LOSSY = {'bf16': 4e-3, 'int8': 2e-2, 'int4': 2e-1}


@pytest.mark.parametrize('mode', MODES)
def test_what_lossy_taps_do_to_each_gradient(data, mode):
    taps, base, weight = data
    parts = adapters()
    names = [n for n, _ in parts.named_parameters()]
    expected = gradients(plain, parts, taps, base, weight)
    got = gradients(
        lambda *args: fused(*args, mode), parts, taps, base, weight
    )
    bound = LOSSY.get(mode, 1e-12)
    for name, gradient, target in zip(
        [*names, 'base'], got, expected, strict=True
    ):
        error = relative_error(gradient, target)
        if name in ('up.bias', 'base'):  # no tap is in them
            assert error < 1e-12, name
        else:
            assert error < bound, name
            # The mode is not just exact under another name.
            assert name != 'down.p' or error > bound / 20 or bound < 1e-9
    # The forward pass is the same in every mode.
    assert torch.equal(
        fused(parts, taps, base, mode), fused(parts, taps, base)
    )


@pytest.mark.parametrize(
    'mode, of_a_token, once',
    [
        ('exact', 4 * CHANNELS, 0),
        # Projections are kept in 16 bits.
        ('bf16', 2 * CHANNELS + 2 * RANK, 0),
        # Mean and deviation of each channel.
        ('int8', CHANNELS + 4 + 2 * RANK, 8 * CHANNELS),
        # Groups of 8, the largest power of two that divides 24.
        (
            'int4',
            CHANNELS // 2 + 2 * CHANNELS // 8 + 2 * RANK,
            8 * CHANNELS,
        ),
        ('recompute', 0, 0),
    ],
)
def test_bytes_kept_for_backward(mode, of_a_token, once):
    """In fp32, counted by storage, beside the parameters and the image."""
    parts = adapters(torch.float32)
    assert bytes_kept(parts, mode) == TAPS * (2 * TOKENS * of_a_token + once)


@pytest.mark.parametrize('mode', MODES)
def test_nothing_is_kept_without_gradients(data, mode):
    taps, base, _ = data
    bank = adapters(taps=1)
    highway = Highway(bank, base, TAP_CODECS[mode], replay_of(taps))
    with torch.no_grad():
        highway.add(0, taps[0])
        assert highway._kept == {0: ()}
        assert not highway.sum().requires_grad


@pytest.mark.parametrize('mode', MODES)
def test_backward_twice_and_by_a_checkpoint_give_the_same(data, mode):
    taps, base, weight = data
    parts = adapters()
    inputs = inputs_of(parts, base)
    loss = (fused(parts, taps, base, mode) * weight).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_same(torch.autograd.grad(loss, inputs), first, rtol=0, atol=0)

    def checkpointed(*args):
        return checkpoint(fused, *args, mode, use_reentrant=False)

    again = gradients(checkpointed, parts, taps, base, weight)
    assert_same(again, first, rtol=0, atol=0)


def test_a_gradient_of_the_gradient_is_refused(data):
    taps, base, weight = data
    loss = (fused(adapters(), taps, base) * weight).square().sum()
    (gradient,) = torch.autograd.grad(loss, base, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


@pytest.mark.parametrize('mode', ['exact', 'recompute'])
def test_what_has_changed_since_is_noticed(data, mode):
    taps, base, _ = data
    part = adapters(taps=1)
    tap = taps[:1].clone()
    total = fused(part, tap, base, mode)
    tap.mul_(2)  # what is kept, or what the trunk would run on
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        total.sum().backward()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_gives_fp32_gradients(
    data, mode, dtype
):
    taps, base, weight = (t.detach().float() for t in data)
    parts = adapters(torch.float32)
    expected = gradients(plain, parts, taps, base.requires_grad_(), weight)
    with torch.autocast('cpu', dtype=dtype):
        fast = fast_dtype(dtype, taps.device)
        assert fused(parts, taps, None, mode).dtype == fast
        total = fused(parts, taps, base, mode)
    assert total.dtype == base.dtype  # which is not rounded
    got = torch.autograd.grad((total * weight).sum(), inputs_of(parts, base))
    bound = max(LOSSY.get(mode, 0), 2e-2)
    for gradient, target in zip(got, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, target) < bound


@pytest.mark.parametrize('mode', MODES)
def test_backward_under_autocast_is_that_outside(data, mode):
    taps, base, weight = (t.detach().float() for t in data)
    parts = adapters(torch.float32)
    inputs = inputs_of(parts, base.requires_grad_())
    loss = (fused(parts, taps, base, mode) * weight).sum()
    outside = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        inside = torch.autograd.grad(loss, inputs)
    assert_same(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize('mode', MODES)
def test_a_type_asked_for_comes_before_autocast(data, mode):
    taps, base, weight = (t.detach().float() for t in data)
    parts = adapters(torch.float32)
    inputs = inputs_of(parts, base.requires_grad_())

    def run(compute, autocast):
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            total = fused(parts, taps, base, mode, compute)
        return [total, *torch.autograd.grad(total, inputs, weight)]

    exactly = run(None, None)
    assert_same(run(torch.float32, torch.bfloat16), exactly, rtol=0, atol=0)
    rounded = run(torch.bfloat16, None)
    assert_same(rounded, run(None, torch.bfloat16), rtol=0, atol=0)
    for one, target in zip(rounded, exactly, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, target.double()) < 2e-2
    emulated = fast_dtype(torch.bfloat16, base.device) == torch.float32
    assert torch.equal(rounded[0], exactly[0]) == emulated


def test_neither_base_nor_taps_is_no_sum():
    bank, codec = adapters(), TAP_CODECS['exact']
    assert Highway(bank, None, codec).sum() is None
    base = torch.randn(1, 2, CHANNELS)
    assert Highway(bank, base, codec).sum() is base


def test_a_tap_that_never_came_is_no_silent_noise(data):
    taps, base, _ = data
    highway = Highway(adapters(), base, TAP_CODECS['exact'])
    highway.add(2, taps[2])
    with pytest.raises(RuntimeError, match='Expected 4 taps in stage 0, but'):
        highway.sum()
