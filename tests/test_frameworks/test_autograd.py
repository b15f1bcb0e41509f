import torch
from torch.utils.checkpoint import checkpoint

from e3va_mm.frameworks.autograd import in_backward


def test_a_checkpoint_runs_again_in_backward():
    seen = []

    def function(x):
        seen.append(in_backward())
        return x.square()

    x = torch.ones(1, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).backward()
    assert seen == [False, True]
    assert not in_backward()
