"""Accounting on models whose bytes are known by arithmetic."""

import gc

import pytest
import torch
from torch import nn

from e3va_mm.measure import LiveBytes


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


def test_held_tensors_count_from_the_start_and_once():
    weight = torch.zeros(10)
    with LiveBytes([weight, weight.view(2, 5)]) as count:
        assert count.live == 40
        weight.add_(1)
    assert count.peak == 40


def test_a_training_step_by_arithmetic():
    """Linear (no bias), ReLU, Linear to one number, batch 8, width 32."""
    width, batch = 32, 8
    model = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 1, bias=False),
    )
    weights = sum(p.numel() for p in model.parameters()) * 4
    with LiveBytes(model.parameters()) as count:
        x = torch.zeros(batch, width)
        before = count.live
        loss = model(x).sum()
        gc.collect()
        # Kept: the ReLU's output (also the second layer's input); the first
        # layer's input is `x`. The first output is not kept by ReLU.
        kept = count.live - before - 4
        assert kept == batch * width * 4
        loss.backward()
        assert count.live >= 2 * weights + batch * width * 4


def test_a_tensor_hidden_on_a_context_is_seen():

    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x * 2  # not by save_for_backward
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.hidden

    x = torch.zeros(100, requires_grad=True)
    with LiveBytes([x]) as count:
        out = Hiding.apply(x)
        assert count.live == 3 * 400
        del out
    assert count.live == 400


@pytest.mark.parametrize('dtype, size', [(torch.bfloat16, 2), (torch.int8, 1)])
def test_bytes_follow_the_type(dtype, size):
    with LiveBytes() as count:
        tensor = torch.zeros(10, dtype=dtype)
        assert count.live == 10 * size
        del tensor
