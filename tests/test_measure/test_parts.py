from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from e3va_mm.measure.gpu_model import Launches
from e3va_mm.measure.parts import BETWEEN, UPDATE, Parts
from tests.helpers import build_e3va


class Model(nn.Module):
    def __init__(self, recomputed):
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.neck = nn.Tanh()
        self.recomputed = recomputed

    def forward(self, x):
        x = self.backbone(x)
        if self.recomputed:
            return checkpoint(self.neck, x, use_reentrant=False).sum()
        return self.neck(x).sum()


def kernels(counted):
    found = Counter()
    for kernel, count in counted.work.items():
        found[kernel.place] += count
    return found


@pytest.mark.parametrize('recomputed', [False, True])
def test_both_directions_belong_to_the_part_that_ran_forward(recomputed):
    model, x = Model(recomputed), torch.zeros(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Parts(model) as part, Launches(part) as counted:
        for _ in range(2):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert kernels(counted) == {
        # A product; a product and a sum.
        'backbone': 2 * 3,
        'neck': 2 * (2 + recomputed),
        # The sum, and the gradient of the loss.
        BETWEEN: 2 * 2,
        # Weight and bias.
        UPDATE: 2 * 2,
    }


@pytest.mark.parametrize('save_taps', ['exact', 'recompute'])
def test_a_side_path_is_a_part_of_its_own(save_taps):
    backbone = build_e3va(tuner=dict(rank=4, save_taps=save_taps))
    with Parts(backbone) as part, Launches(part) as counted:
        outputs = backbone(torch.zeros(1, 3, 64, 64))
        forward = kernels(counted)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    both = kernels(counted)
    assert set(both) >= {'patch_embed', 'stages', 'side_path'}
    assert both['side_path'] > forward['side_path']
    # The trunk has no backward, but may run again.
    again = save_taps == 'recompute'
    assert (both['stages'] > forward['stages']) == again
    assert (both['patch_embed'] > forward['patch_embed']) == again
    # It calls its side path as before.
    assert not {'add_tap', 'output'} & {*vars(backbone.tuner)}
