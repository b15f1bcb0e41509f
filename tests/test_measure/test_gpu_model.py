import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import SwinBlock
from torch import nn

from e3va_mm.measure import gpu_model
from e3va_mm.measure.gpu_model import CARDS, Launches, count_launches
from e3va_mm.numerics.products import linear


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 2, 6, 8))

    def forward(self, x):
        mask = torch.empty(1, 1, 6, 5, device=x.device)
        return F.scaled_dot_product_attention(self.queries, x, x, mask)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = SwinBlock(32, 2, 64, window_size=4)
        self.requires_grad_(False)

    def forward(self, x):
        return self.block(x, (8, 8))


# Of the Swin block: norm, padding, windows; queries, keys and values, scale,
# copies of queries and keys, product, position bias (lookup, copy, sum),
# softmax, copy of values, product, copy, projection; windows back, sum; norm,
# two layers and GELU, sum.
SWIN_BLOCK = 3 + 5 + 3 + 5 + 2 + 5
# Products: a layer's gradient of the weight, and, if it is not the first, of
# its input; a sum for that of the bias.
MODULES = {
    'linear': (lambda: nn.Linear(8, 4), (3, 8), 3, 2 * 2 * 3 * 8 * 4),
    'products': (lambda: nn.Linear(8, 4, False), (3, 8), 2, 2 * 2 * 96),
    'norm and linear': (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)),
        (3, 8),
        2 + 3 + 1,
        3 * 2 * 3 * 8 * 4,
    ),
    'convolution': (
        lambda: nn.Conv2d(3, 4, 2, bias=False),
        (1, 3, 5, 5),
        2,
        2 * 2 * (4 * 4 * 4) * (3 * 2 * 2),
    ),
    # Two products forward; five backward, the first of them anew. The gradient
    # of the queries is copied to their layout.
    'attention': (Attention, (1, 2, 5, 8), 3, 7 * 2 * 2 * 6 * 5 * 8),
    'swin block': (
        Block,
        (1, 64, 32),
        SWIN_BLOCK,
        2 * 64 * 32 * (3 * 32 + 32 + 2 * 64) + 2 * 2 * 64 * 16 * 32,
    ),
}


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('name', MODULES)
def test_counts_of_modules_whose_operations_are_known(name, device):
    build, shape, kernels, flops = MODULES[name]
    module = build()
    if device == 'meta':
        counted = count_launches(module, torch.zeros(shape))
    else:
        x = torch.zeros(shape)
        with Launches() as counted:
            output = module(x)
            if output.requires_grad:
                output.backward(torch.empty_like(output))
    assert counted.kernels == kernels
    assert sum(k.flops * n for k, n in counted.work.items()) == flops


def test_every_operation_costs_the_host_and_launches_cost_more():
    layer = nn.Linear(8, 4)
    with torch.no_grad(), Launches() as counted:
        layer(torch.empty(3, 8))
    # The memory of the input, the transposed weight, the product.
    assert (counted.ops, counted.kernels) == (3, 1)
    assert counted.host == pytest.approx(3 * 4e-6 + 3e-6)


def bytes_of(function, *args):
    with torch.no_grad(), Launches() as counted:
        function(*args)
    return sum(kernel.moved * n for kernel, n in counted.work.items())


def test_bytes_are_what_is_read_and_written():
    x = torch.zeros(4, 8)
    assert bytes_of(torch.neg, x) == 2 * x.nbytes
    assert bytes_of(x.add_, x.clone()) == 3 * x.nbytes
    assert bytes_of(x.zero_) == x.nbytes
    row = torch.zeros(8).expand(4, 8)  # is there once
    assert bytes_of(torch.neg, row) == 8 * 4 + x.nbytes
    assert bytes_of(torch._foreach_add_, [x, x], 1.0) == 4 * x.nbytes


def test_what_bounds_a_kernel_depends_on_the_card():
    single, half = (
        torch.empty(2048, 2048, dtype=dtype, device='meta')
        for dtype in (torch.float32, torch.float16)
    )

    def bound(function, *args, card='3090'):
        with Launches() as counted:
            function(*args)
        (kernel,) = counted.work
        name, seconds = kernel.bound(CARDS[card])
        assert seconds == counted.gpu(card)
        return name, seconds

    assert bound(torch.neg, single[:2]) == ('launches', 3e-6)
    memory = pytest.approx(2 * 2048**2 * 4 / 936e9)
    assert bound(torch.neg, single) == ('memory', memory)
    flops = 2 * 2048**3
    arithmetic = pytest.approx(flops / (0.6 * 35.6e12))
    assert bound(torch.mm, single, single) == ('arithmetic', arithmetic)
    arithmetic = pytest.approx(flops / (0.6 * 71e12))
    assert bound(torch.mm, half, half) == ('arithmetic', arithmetic)
    slow = pytest.approx(flops / (0.6 * 11.3e12))  # no tensor cores
    assert bound(torch.mm, half, half, card='1080Ti') == ('arithmetic', slow)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_products_of_16_bits_stay_so_where_a_cpu_emulates_them(
    monkeypatch, dtype
):
    monkeypatch.setattr(gpu_model, 'EMULATED', {dtype})
    a, b = torch.randn(2, 64, 64).to(dtype)
    out = torch.empty_like(a)
    with Launches() as counted:
        done = linear(a, b)
        torch.mm(a, b.t(), out=out)
    wanted = (a.float() @ b.float().t()).to(dtype)
    assert torch.equal(done, wanted) and torch.equal(out, wanted)
    ((kernel, count),) = counted.work.items()
    assert (count, kernel.half, kernel.moved) == (2, True, 3 * a.nbytes)


def test_registered_operators_are_one_kernel():
    library = torch.library.Library('e3va_test', 'DEF')
    library.define('twice(Tensor x) -> Tensor')
    library.impl('twice', lambda x: x.neg().neg() * 2, 'CPU')
    x = torch.zeros(4)
    with Launches() as counted:
        torch.ops.e3va_test.twice(x)
    assert (counted.ops, counted.kernels) == (1, 1)
