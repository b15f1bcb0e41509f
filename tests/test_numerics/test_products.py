"""Products by the fastest way that a CPU has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from e3va_mm.numerics import products
from e3va_mm.numerics.products import (
    fast_dtype,
    linear,
    product,
    transposed_product,
)

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=['emulated', 'native'])
def emulated(request, monkeypatch):
    monkeypatch.setattr(
        products, 'EMULATED', set(HALVES) if request.param else set()
    )


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('with_bias', [True, False])
def test_16_bits_are_one_rounding_from_fp64(emulated, dtype, with_bias):
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


def test_gradients_in_16_bits_keep_16_bits(emulated):
    given = [torch.randn(shape) for shape in ((2, 7, 64), (9, 64), (9,))]
    given = [x.bfloat16().requires_grad_() for x in given]
    weight, kept = torch.randn(2, 7, 9).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    ):
        done = linear(*given)
    if products.EMULATED:  # torch's own product keeps more or less by build
        assert {x.dtype for x in kept} == {torch.bfloat16}
        assert sum(x.numel() for x in kept) == 2 * 7 * 64 + 9 * 64
    # Not contiguous, as from a map.
    wide = weight.transpose(1, 2).contiguous().transpose(1, 2)
    found = torch.autograd.grad(done, given, wide)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = torch.autograd.grad(F.linear(*exact), exact, weight.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, atol=0.02, rtol=0.01)


def test_emulated_types_are_computed_in_fp32_on_cpu_alone(emulated):
    cpu, other = torch.device('cpu'), torch.device('cuda')
    for half in HALVES:
        fast = torch.float32 if products.EMULATED else half
        assert fast_dtype(half, cpu) == fast
        assert fast_dtype(half, other) == half
    assert fast_dtype(torch.float64, cpu) == torch.float64


@pytest.mark.skipif(not products.ONEDNN, reason='MKL is used here')
@pytest.mark.parametrize('shape', [(1, 5), (3, 8, 5), (2, 1, 1, 5), (0, 5)])
@pytest.mark.parametrize('with_bias', [True, False])
def test_onednn_is_as_precise_as_fp32_is(shape, with_bias):
    x, weight = torch.randn(shape), torch.randn(9, 5)
    bias = torch.randn(9) if with_bias else None
    torch.testing.assert_close(
        linear(x, weight, bias), F.linear(x, weight, bias)
    )
    # Neither operand has to be contiguous.
    torch.testing.assert_close(
        linear(x[..., :3], weight.t()[:3].t(), bias),
        F.linear(x[..., :3], weight[:, :3], bias),
    )


@pytest.fixture
def onednn(monkeypatch):
    """Shapes of the products that oneDNN is asked for, whatever the CPU."""
    calls = []

    def counted(x, weight, bias, *rest):
        calls.append(tuple(x.shape))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(products, 'ONEDNN', True)
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise', counted)
    return calls


def test_onednn_computes_plain_fp32_without_a_graph_alone(onednn):
    x, weight = torch.randn(2, 5), nn.Parameter(torch.randn(9, 5))
    linear(x, weight.detach())
    with torch.no_grad():
        linear(x, weight)
    assert onednn == [(2, 5)] * 2
    assert linear(x, weight).requires_grad
    assert linear(x.double(), weight.detach().double()).dtype == torch.float64
    assert not linear(x[:, :0], weight.detach()[:, :0]).any()
    assert len(onednn) == 2


def test_traces_and_exports_hold_plain_operators(onednn):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 5), requires_grad=False)

        def forward(self, x):
            return linear(x, self.weight)

    module, x = Product(), torch.randn(2, 5)
    torch.jit.trace(module, x, check_trace=False)
    torch.export.export(module, (x,), strict=False)
    assert onednn == []


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_products_are_those_of_matrices(dtype):
    a, b = torch.randn(7, 5, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    torch.testing.assert_close(product(a, b), a @ b)
    c = torch.randn(7, 2, dtype=dtype)
    torch.testing.assert_close(transposed_product(a, c), a.t() @ c)
