"""How far a tap that was kept is from the tap, and what it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3va_mm.numerics import temporaries
from e3va_mm.tuners.e3va import tap_ops
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS

CODECS = {name: codec for name, codec in TAP_CODECS.items() if codec}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transposed_product(codec, kept, other):
    return codec.transposed_products([kept], other[:, None])[0]


def there_and_back(name, tap, dtype=torch.float32):
    codec = TAP_CODECS[name]
    return codec.decode(codec.encode(tap), dtype)


def standardised(tap, group):
    """The largest of a token's group, each channel by its deviation."""
    deviation, mean = torch.std_mean(tap.double(), 0, correction=0)
    values = ((tap - mean) / deviation).abs()
    groups = values.unflatten(-1, (-1, group))
    largest = groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2)
    return largest * deviation


# The largest error of a value, by what it is relative to. Scales of int4 are
# in bfloat16, and at an end of the range half a level is cut off.
BOUNDS = {
    'exact': (lambda tap: tap.abs(), 0.0),
    'bf16': (lambda tap: tap.abs(), 2**-8),
    'int8': (lambda tap: standardised(tap, tap.shape[1]), 1.001 / 254),
    'int4': (lambda tap: standardised(tap, min(128, tap.shape[1])), 1.1 / 16),
}
INTEGERS = ('int8', 'int4')


def assert_within_bound(name, back, tap):
    measure, share = BOUNDS[name]
    # The arithmetic is that of single precision.
    rounding = 1e-5 * tap.abs() if name in INTEGERS else 0.0
    assert ((back - tap).abs() <= measure(tap) * share + rounding).all()


def with_outliers(tokens=100, channels=64):
    tap = torch.randn(tokens, channels)
    tap[:, 3] *= 100
    tap[:, 11] += 1000
    tap[7] = 0.0
    return tap


@pytest.mark.parametrize('name', ['int8', 'int4'])
def test_kernels_are_given_rows(name, monkeypatch):
    """They read a tap's channels side by side."""
    lie, statistics = [], tap_ops.statistics
    monkeypatch.setattr(
        tap_ops,
        'statistics',
        lambda tap: lie.append(tap.is_contiguous()) or statistics(tap),
    )
    TAP_CODECS[name].encode(torch.randn(32, 24).t())
    assert lie == [True]


def test_recompute_keeps_nothing():
    assert TAP_CODECS['recompute'] is None
    assert set(CODECS) == set(BOUNDS)


@pytest.mark.parametrize('name', CODECS)
def test_error_is_bounded_also_beside_outliers(name):
    tap = with_outliers()
    back = there_and_back(name, tap)
    assert_within_bound(name, back, tap)
    # The bound is not far from what happens.
    worst = ((back - tap).abs() / BOUNDS[name][0](tap)).nan_to_num().max()
    assert worst >= BOUNDS[name][1] / 2


@pytest.mark.parametrize('name', INTEGERS)
def test_outlier_channels_cost_the_rest_nothing(name):
    tap = torch.randn(1000, 64)
    expected = there_and_back(name, tap) - tap
    tap[:, 3] *= 100
    tap[:, 11] += 1000
    error = there_and_back(name, tap) - tap
    rest = [c for c in range(64) if c not in (3, 11)]
    share = error[:, rest].norm() / expected[:, rest].norm()
    assert share == pytest.approx(1, abs=0.02)
    assert error[:, 3].norm() < 120 * expected[:, 3].norm()


@pytest.mark.parametrize('name', CODECS)
@settings(deadline=None, max_examples=40)
@given(exponent=st.floats(-18, 18), seed=st.integers(0, 10**6))
def test_error_is_bounded_at_every_scale(name, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    tap = torch.randn(4, 32, generator=generator) * 10**exponent
    assert_within_bound(name, there_and_back(name, tap), tap)


@pytest.mark.parametrize('name', CODECS)
@pytest.mark.parametrize('value', [1e-43, 1e-37])
def test_values_whose_scale_has_no_reciprocal(name, value):
    """They may be lost among the smallest normal numbers, but no further."""
    tap = torch.full((2, 32), value)
    back = there_and_back(name, tap)
    smallest = torch.finfo(torch.float32).tiny
    assert ((back - tap).abs() <= smallest + 0.1 * value).all()


@pytest.mark.parametrize('name', CODECS)
@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_overflow_is_not_hidden(name, bad):
    """A scaler of gradients must see it."""
    tap = torch.randn(3, 32)
    tap[1, 5] = bad
    codec = TAP_CODECS[name]
    kept = codec.encode(tap)
    back = codec.decode(kept, torch.float32)
    assert not back[1].isfinite().all()
    # Statistics of a channel are of all tokens.
    assert name in INTEGERS or back[[0, 2]].isfinite().all()
    product = transposed_product(codec, kept, torch.ones(3, 2))
    assert not product[5].isfinite().any()


@pytest.mark.parametrize('name', CODECS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_tap_in_16_bits_is_kept_in_what_it_has(name, dtype):
    """Beside the rounding of its own type nothing is lost."""
    tap = with_outliers().to(dtype)
    back = there_and_back(name, tap, dtype)
    assert back.dtype == dtype
    rounding = torch.finfo(dtype).eps * tap.float().abs()
    measure, share = BOUNDS[name]
    error = (back.float() - tap.float()).abs()
    assert (error <= measure(tap.float()) * share * 1.01 + rounding).all()


def test_float16_has_room_for_the_scales_of_int8():
    tap = torch.randn(50, 32) * 2e-5  # their scales are not, in 16 bits
    back = there_and_back('int8', tap, torch.float16)
    assert (back.float() - tap).norm() < 1e-2 * tap.norm()


@pytest.mark.parametrize(
    'name, of_a_token, once',
    [
        ('exact', 4 * 64, 0),
        ('bf16', 2 * 64, 0),
        ('int8', 64 + 4, 8 * 64),
        ('int4', 32 + 2, 8 * 64),
    ],
)
def test_bytes_of_a_token(name, of_a_token, once):
    kept = TAP_CODECS[name].encode(with_outliers())
    assert sum(part.nbytes for part in kept) == 100 * of_a_token + once
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)


@pytest.mark.parametrize('name', CODECS)
def test_tokens_are_coded_some_at_a_time(name, monkeypatch):
    # Sums of whole numbers are the same in any order.
    codec, tap = TAP_CODECS[name], torch.randint(-50, 50, (100, 64)).float()
    kept = codec.encode(tap)
    rows = slice(30, 61)
    part = codec.decode(codec.rows(kept, rows), torch.float32)
    assert torch.equal(part, codec.decode(kept, torch.float32)[rows])
    monkeypatch.setattr(temporaries, 'CPU_BYTES', 7 * 64 * 4)
    for part, expected in zip(codec.encode(tap), kept, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize('name', CODECS)
@pytest.mark.parametrize('dtype', [torch.float64, *DTYPES])
@pytest.mark.parametrize('channels', [64, 7])
def test_transposed_product_is_that_of_what_comes_back(name, dtype, channels):
    codec, tap = TAP_CODECS[name], with_outliers(channels=64)[:, -channels:]
    kept = codec.encode(tap)
    other = torch.randn(100, 4).to(dtype)
    product = transposed_product(codec, kept, other)
    expected = codec.decode(kept, torch.float32).double().t() @ other.double()
    bound = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, 1e-2)
    if name in INTEGERS:
        bound = 1e-6  # in single precision at least
    assert (product - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize('name', CODECS)
def test_neither_way_changes_what_it_is_given(name):
    codec, tap = TAP_CODECS[name], with_outliers()
    original = tap.clone()
    kept = codec.encode(tap)
    assert (kept[0] is tap) == (name == 'exact')
    before = [part.clone() for part in kept]
    codec.decode(kept, torch.float32)
    assert torch.equal(tap, original)
    for part, copy in zip(kept, before, strict=True):
        assert torch.equal(part, copy)


@pytest.mark.parametrize('name', CODECS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_tap_cut_out_of_a_larger_tensor_does_not_keep_that(name, dtype):
    # Windows of 7 x 7 over 10 rows, padded to 14.
    larger = torch.randn(1, 14, 7, 32).to(dtype)
    tap = larger[:, :10].reshape(-1, 32)
    assert tap.untyped_storage().nbytes() == larger.nbytes
    codec = TAP_CODECS[name]
    kept = codec.encode(tap)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)
    assert_within_bound(name, codec.decode(kept, torch.float32), tap.float())
