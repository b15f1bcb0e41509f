"""The fused highway against plain autograd over the same adapters."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from e3va_mm.models import LowRankAdapter
from e3va_mm.models.side_path.highway import Highway
from e3va_mm.models.side_path.kept_taps import TAP_CODECS

CHANNELS, RANK, TAPS, TOKENS = 24, 3, 4, 50


def adapters(dtype=torch.float64):
    made = [LowRankAdapter(CHANNELS, RANK) for _ in range(TAPS)]
    for adapter in made:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return [adapter.to(dtype) for adapter in made]


def fused(parts, taps, base, codec='exact'):
    highway = Highway(base, TAP_CODECS[codec])
    for adapter, tap in zip(parts, taps, strict=True):
        highway.add(adapter, tap)
    return highway.sum()


def plain(parts, taps, base):
    total = sum(a(t) for a, t in zip(parts, taps, strict=True))
    return total if base is None else base + total


def gradients(function, parts, taps, base, weight):
    inputs = [p for part in parts for p in part.parameters()]
    if base is not None:
        inputs.append(base)
    return torch.autograd.grad(
        (function(parts, taps, base) * weight).sum(), inputs
    )


@pytest.fixture
def data():
    taps = torch.randn(TAPS, 2, TOKENS, CHANNELS, dtype=torch.float64)
    base = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64)
    return taps, base.requires_grad_(), torch.randn_like(base)


def test_gradcheck_in_fp64():
    parts = adapters()
    taps = torch.randn(TAPS, 1, 5, CHANNELS, dtype=torch.float64)
    base = torch.randn(1, 5, CHANNELS, dtype=torch.float64, requires_grad=True)
    inputs = [p for part in parts for p in part.parameters()]
    torch.autograd.gradcheck(
        lambda base, *_: fused(parts, taps, base), (base, *inputs)
    )


@pytest.mark.parametrize('with_base', [True, False])
def test_equals_plain_autograd(data, with_base):
    taps, base, weight = data
    base = base if with_base else None
    parts = adapters()
    torch.testing.assert_close(
        fused(parts, taps, base), plain(parts, taps, base)
    )
    got = gradients(fused, parts, taps, base, weight)
    expected = gradients(plain, parts, taps, base, weight)
    for gradient, target in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, target)


def test_exact_in_fp32_is_within_1e5_of_fp64(data):
    taps, base, weight = data
    parts = adapters()
    expected = gradients(plain, parts, taps, base, weight)
    parts = [part.float() for part in parts]
    base = base.detach().float().requires_grad_()
    got = gradients(fused, parts, taps.float(), base, weight.float())
    for gradient, target in zip(got, expected, strict=True):
        error = (gradient.double() - target).norm() / target.norm()
        assert error < 1e-5


@pytest.mark.parametrize(
    'codec, cosine', [('bf16', 0.99999), ('int8', 0.9999)]
)
def test_lossy_taps_touch_the_first_factor_alone(data, codec, cosine):
    taps, base, weight = data
    parts = adapters()
    names = [n for part in parts for n, _ in part.named_parameters()]
    expected = gradients(plain, parts, taps, base, weight)
    got = gradients(
        lambda *args: fused(*args, codec), parts, taps, base, weight
    )
    for name, gradient, target in zip(
        [*names, 'base'], got, expected, strict=True
    ):
        if name == 'down.p':
            assert not torch.equal(gradient, target)
            assert (
                torch.cosine_similarity(
                    gradient.flatten(), target.flatten(), dim=0
                )
                > cosine
            )
        else:
            torch.testing.assert_close(gradient, target)


@pytest.mark.parametrize('codec', list(TAP_CODECS))
def test_lossy_taps_do_not_change_the_forward_pass(data, codec):
    taps, base, _ = data
    parts = adapters()
    assert torch.equal(
        fused(parts, taps, base, codec), fused(parts, taps, base)
    )


def test_int8_error_is_bounded_by_the_largest_value_of_a_token():
    tap = torch.randn(100, 32)
    tap[:, 3] *= 100  # an outlier channel
    tap[7] = 0.0
    codec = TAP_CODECS['int8']
    back = codec.decode(codec.encode(tap), torch.float32)
    bound = tap.abs().amax(-1, keepdim=True) / 254
    assert ((back - tap).abs() <= bound * 1.001).all()
    assert not back[7].any()


@pytest.mark.parametrize(
    'codec, of_a_tap',
    [
        ('exact', 4 * CHANNELS),
        ('bf16', 2 * CHANNELS + 4 * RANK),
        ('int8', CHANNELS + 4 + 4 * RANK),
    ],
)
def test_bytes_kept_for_backward_are_the_taps(codec, of_a_tap):
    """In fp32, counted by storage, beside the parameters."""
    parts = adapters(torch.float32)
    own = {
        p.untyped_storage().data_ptr()
        for part in parts
        for p in part.parameters()
    }
    taps = torch.randn(TAPS, 2, TOKENS, CHANNELS)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = fused(parts, taps, None, codec)
    assert total.requires_grad
    assert (
        sum(size for pointer, size in kept.items() if pointer not in own)
        == TAPS * 2 * TOKENS * of_a_tap
    )


def test_nothing_is_kept_without_gradients(data):
    taps, base, _ = data
    highway = Highway(base, TAP_CODECS['exact'])
    with torch.no_grad():
        highway.add(adapters()[0], taps[0])
        assert not highway._kept
        assert not highway.sum().requires_grad


def test_autocast_computes_in_its_type_and_gives_fp32_gradients(data):
    taps, base, weight = (t.detach().float() for t in data)
    parts = adapters(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        total = fused(parts, taps, base)
    assert total.dtype == torch.bfloat16
    (total * weight).sum().backward()
    for part in parts:
        for parameter in part.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


def test_works_under_non_reentrant_checkpointing(data):
    taps, base, weight = data
    parts = adapters()
    expected = gradients(fused, parts, taps, base, weight)
    got = gradients(
        lambda *args: checkpoint(fused, *args, use_reentrant=False),
        parts,
        taps,
        base,
        weight,
    )
    for gradient, target in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, target)
