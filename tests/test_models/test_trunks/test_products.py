"""Products in 16 bits where a CPU has no instructions for them."""

import pytest
import torch
import torch.nn.functional as F

from e3va_mm.models.trunks import products
from e3va_mm.models.trunks.products import fast_dtype, linear


@pytest.fixture(params=[True, False], ids=['emulated', 'native'])
def emulated(request, monkeypatch):
    halves = {torch.bfloat16, torch.float16}
    monkeypatch.setattr(
        products, 'EMULATED', halves if request.param else set()
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('with_bias', [True, False])
def test_one_rounding_away_from_double_precision(emulated, dtype, with_bias):
    x, weight = torch.randn(5, 7, 64).to(dtype), torch.randn(9, 64).to(dtype)
    bias = torch.randn(9).to(dtype) if with_bias else None
    got = linear(x, weight, bias)
    assert got.dtype == dtype
    expected = F.linear(
        x.double(), weight.double(), bias.double() if with_bias else None
    )
    error = (got.double() - expected).abs()
    # Half a unit of the last place, and the sum's own rounding.
    bound = 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-4
    assert (error <= bound).all()


def test_single_precision_is_left_alone(emulated):
    x, weight, bias = torch.randn(3, 8), torch.randn(2, 8), torch.randn(2)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_only_16_bits_can_be_missing():
    assert products.EMULATED <= {torch.bfloat16, torch.float16}


def test_what_is_emulated_is_computed_in_single_precision(emulated):
    cpu, other = torch.device('cpu'), torch.device('cuda')
    for half in (torch.bfloat16, torch.float16):
        fast = torch.float32 if products.EMULATED else half
        assert fast_dtype(half, cpu) == fast
        assert fast_dtype(half, other) == half
    assert fast_dtype(torch.float64, cpu) == torch.float64
