"""Accounting on models whose bytes are known by arithmetic."""

import gc

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from e3va_mm.measure import CATEGORIES, LiveBytes

N = 1000  # values of float32 in a tensor
SIZE = 4 * N
SCALAR = 4


class Hiding(torch.autograd.Function):
    """Doubles, and keeps a copy where ``save_for_backward`` does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x * 2
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def parts(**sizes):
    return dict(dict.fromkeys(CATEGORIES, 0), **sizes)


def test_views_share_and_the_dead_leave():
    with LiveBytes() as count:
        a = torch.zeros(256)
        b = a.view(16, 16)[:3]
        assert (count.live, count.peak) == (1024, 1024)
        c = torch.zeros(100, dtype=torch.float64)
        assert count.live == 1824
        del a, c
        assert count.live == 1024, 'a view keeps its storage'
        del b
    assert (count.live, count.peak) == (0, 1824)
    assert count.at_peak == parts(temporaries=1824)


def test_a_module_is_its_parameters_and_buffers():
    model = nn.BatchNorm1d(10)
    # Weight, bias, mean and variance, and the number of batches in int64.
    assert LiveBytes(model).now == parts(weights=4 * 40 + 8)


def test_storages_that_grow_or_shrink_are_followed():
    with LiveBytes() as count:
        out = torch.empty(0)
        torch.add(torch.zeros(N), torch.zeros(N), out=out)
        assert (count.live, count.peak) == (SIZE, 3 * SIZE)
        out.resize_(2 * N)
        assert count.live == 2 * SIZE
    assert count.now == parts(temporaries=2 * SIZE)


def test_a_quantised_weight_has_the_bytes_of_its_parts():
    parameter = TwoTensor(torch.zeros(N), torch.zeros(N))
    with LiveBytes([parameter]) as count:
        assert count.now == parts(weights=2 * SIZE)
        copy = parameter.clone()
        assert count.now == parts(weights=2 * SIZE, temporaries=2 * SIZE)
        del copy
    assert count.live == 2 * SIZE


def test_a_sparse_tensor_is_no_error():
    with LiveBytes() as count:
        torch.zeros(3, 3).to_sparse()
    assert count.peak >= 36


def test_categories_of_a_step_by_arithmetic():
    """``sum(w x)``: backward needs ``x`` alone and makes the gradient."""
    weight = nn.Parameter(torch.ones(N))
    optimizer = torch.optim.SGD([weight], lr=1, momentum=0.9)
    with LiveBytes([weight], optimizer) as count:
        x = torch.ones(N)
        y = weight * x
        assert count.now == parts(weights=SIZE, temporaries=2 * SIZE)
        loss = y.sum()
        del y
        loss.backward()
        del loss
        # The scalars: the loss and its gradient, made before backward begins.
        expected = parts(weights=SIZE, kept=SIZE + 2 * SCALAR, gradients=SIZE)
        assert count.at_peak == expected
        assert count.kept_at_backward == {'': SIZE + 2 * SCALAR}
        assert count.now == parts(weights=SIZE, kept=SIZE, gradients=SIZE)
        del x
        optimizer.step()
        optimizer.zero_grad()
        assert weight.eq(0).all()
    assert count.now == parts(weights=SIZE, optimizer=SIZE)
    # It has grown since: momentum is made by the first step.
    assert count.at_peak == expected
    assert count.peak == sum(expected.values()) == 3 * SIZE + 2 * SCALAR


def test_state_made_while_counting_is_the_optimizers():
    weight = nn.Parameter(torch.ones(N))
    optimizer = torch.optim.SGD([weight], lr=1, momentum=0.9)
    weight.grad = torch.ones(N)
    with LiveBytes([weight], optimizer) as count:
        assert count.now == parts(weights=SIZE, gradients=SIZE)
        optimizer.step()
    three = parts(weights=SIZE, gradients=SIZE, optimizer=SIZE)
    assert count.now == count.at_peak == three
    with LiveBytes([weight], optimizer) as count:
        assert count.now == three, 'state that is there already'


def test_what_is_kept_counts_as_kept_at_a_peak_in_forward():
    x = torch.ones(N, requires_grad=True)
    with LiveBytes([x]) as count:
        y = (x * 3).exp()  # keeps its output alone
        large = torch.zeros(5 * N)
        assert count.at_peak == parts(weights=SIZE, temporaries=6 * SIZE)
        del large
        loss = y.sum()
        del y
        loss.backward()
    assert count.peak == 7 * SIZE
    assert count.at_peak == parts(
        weights=SIZE, kept=SIZE, temporaries=5 * SIZE
    )


def test_a_peak_does_not_change_by_what_is_born_later():
    x = torch.ones(N, requires_grad=True)
    with LiveBytes([x]) as count:
        torch.zeros(20 * N)
        (x * 3).exp().sum().backward()
    assert count.at_peak == parts(weights=SIZE, temporaries=20 * SIZE)
    assert count.kept_at_backward == {'': SIZE + 2 * SCALAR}


def test_a_tensor_hidden_on_a_context_is_kept():
    x = torch.zeros(N, requires_grad=True)
    with LiveBytes([x]) as count:
        y = Hiding.apply(x)
        assert count.live == 3 * SIZE
        loss = y.sum()
        del y
        assert count.live == 2 * SIZE + SCALAR
        loss.backward()
        assert count.kept_at_backward == {'': SIZE + 2 * SCALAR}
        del loss
    # The node is gone, and what it has hidden; x has its gradient.
    assert count.now == parts(weights=SIZE, gradients=SIZE)


def test_saved_weights_stay_weights():
    first, last = nn.Parameter(torch.ones(N)), nn.Parameter(torch.ones(N))
    with LiveBytes([first, last]) as count:
        (first * last).sum().backward()
    assert count.kept_at_backward == {'': 2 * SCALAR}
    assert count.now == parts(weights=2 * SIZE, gradients=2 * SIZE)


def test_a_weight_that_an_optimizer_holds_too_stays_a_weight():

    class Averaging:
        def state_dict(self):
            return dict(state=[weight, average])

    weight, average = torch.ones(N), torch.ones(N)
    with LiveBytes([weight], Averaging()) as count:
        pass
    assert count.now == parts(weights=SIZE, optimizer=SIZE)


def test_what_is_recomputed_is_temporary():
    x = torch.ones(N, requires_grad=True)
    with LiveBytes([x]) as count:
        y = checkpoint(lambda v: (v * 3).exp().exp(), x, use_reentrant=False)
        loss = y.sum()
        del y
        assert count.live == SIZE + SCALAR
        loss.backward()
    assert count.kept_at_backward == {'': 2 * SCALAR}
    # Two outputs of exp, two gradients; more passes on the way.
    assert count.at_peak['temporaries'] >= 2 * SIZE


def test_two_steps_keep_twice():
    x = torch.ones(N, requires_grad=True)
    with LiveBytes([x]) as count:
        for times in (1, 3):
            (x.repeat(times) * 2).exp().sum().backward()
            kept = times * SIZE + 2 * SCALAR
            assert count.kept_at_backward == {'': kept}
    assert count.now == parts(weights=SIZE, gradients=SIZE)


def test_counting_changes_no_result_and_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with LiveBytes(model) as count:
        model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert not parameter._post_accumulate_grad_hooks
    gc.collect()
    weights = sum(p.nbytes for p in model.parameters())
    assert count.now == parts(
        weights=weights, gradients=weights, kept=x.nbytes
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_an_accelerator_only_its_own_storages_count():
    weight = nn.Parameter(torch.ones(N, device='cuda'))
    with LiveBytes([weight]) as count:
        torch.zeros(50 * N)
        x = torch.ones(N, device='cuda')
        (weight * x).sum().backward()
        torch.cuda.synchronize()
    assert count.at_peak == parts(
        weights=SIZE, kept=SIZE + 2 * SCALAR, gradients=SIZE
    )


def test_other_devices_than_the_weights_do_not_count():
    weight = torch.zeros(N, device='meta')
    with LiveBytes([weight]) as count:
        torch.zeros(50 * N)
        other = torch.zeros(N, device='meta')
        assert count.live == count.peak == 2 * SIZE
        del other
