"""Codes of taps against plain products."""

import pytest
import torch

from e3va_mm.tuners.e3va.codes import Codes
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from tests.test_tuners.test_e3va.test_highway import replay_of

COUNT, CHANNELS, RANK = 3, 16, 4
NEAR = {'exact': 1e-6, 'recompute': 1e-6, 'bf16': 1e-2, 'int8': 2e-2}
NEAR['int4'] = 0.2


@pytest.fixture
def taps():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 2, 10, CHANNELS, generator=generator)


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(COUNT, CHANNELS, RANK, generator=generator)
    return found.requires_grad_()


def codes_of(factors, taps, mode, **options):
    codes = Codes(factors, TAP_CODECS[mode], replay_of(taps), **options)
    for index, tap in enumerate(taps):
        codes.add(index, tap)
    return codes.codes()


@pytest.mark.parametrize('mode', TAP_CODECS)
def test_codes_and_gradients_are_those_of_products(taps, factors, mode):
    expected = torch.cat([*(taps @ factors[:, None])], -1)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), factors)
    found = codes_of(factors, taps, mode)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((found * weight).sum(), factors)
    assert (gradient - wanted).norm() <= NEAR[mode] * wanted.norm()


@pytest.mark.parametrize(
    'mode, each', [('exact', 4), ('bf16', 2), ('int8', 1), ('recompute', 0)]
)
def test_no_more_than_the_taps_is_kept(taps, factors, mode, each):
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = [tap.clone() for tap in taps]
    image = taps.untyped_storage().data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        codes = Codes(factors, TAP_CODECS[mode], replay_of(taps))
        for index, tap in enumerate(own):
            codes.add(index, tap)
        assert codes.codes().requires_grad
    kept.pop(image, None)
    # In 8 bits, scales of tokens and statistics of channels come on top.
    more = COUNT * (20 * 4 + 2 * CHANNELS * 4) if mode == 'int8' else 0
    assert sum(kept.values()) <= taps.numel() * each + more
    assert (sum(kept.values()) == 0) == (mode == 'recompute')


def test_nothing_is_kept_without_gradients(taps, factors):
    with torch.no_grad():
        codes = Codes(factors, TAP_CODECS['exact'])
        codes.add(0, taps[0])
        assert codes._kept == {0: ()}


def test_products_in_another_type(taps, factors):
    found = codes_of(factors, taps, 'exact', compute=torch.float64)
    assert found.dtype == torch.float64
    found.sum().backward()
    assert factors.grad.dtype == torch.float32


def test_a_tap_that_is_missing(taps, factors):
    with pytest.raises(RuntimeError, match='Expected 3 taps in stage 0, but'):
        codes_of(factors, taps[:2], 'exact')
