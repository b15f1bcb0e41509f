import pytest
import torch
from mmcv.ops import RoIAlign, batched_nms
from torch import nn

from e3va_mm.frameworks.cpu_amp import CPUAmpOptimWrapper


@pytest.fixture
def wrapper():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, CPUAmpOptimWrapper(optimizer)


def test_products_are_in_half_precision_and_weights_are_not(wrapper):
    model, optim_wrapper = wrapper
    before = model.weight.detach().clone()
    with optim_wrapper.optim_context(model):
        out = model(torch.ones(2, 8))
        assert out.dtype == torch.bfloat16
        loss = out.float().square().sum()
    assert model(torch.ones(2, 8)).dtype == torch.float32
    optim_wrapper.update_params(loss)
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_mmcv_operators_compute_in_single_precision(wrapper):
    model, optim_wrapper = wrapper
    align = RoIAlign((3, 3), sampling_ratio=2)
    # Values that bfloat16 has exactly.
    maps = torch.randint(-8, 8, (1, 4, 16, 16)).float()
    rois = torch.tensor([[0, 1, 1, 9, 12]]).float()
    weight = torch.randint(-4, 4, (1, 4, 3, 3)).float()

    def run(dtype):
        x = maps.detach().to(dtype, copy=True).requires_grad_()
        out = align(x, rois.to(dtype))
        (out * weight.to(dtype)).sum().backward()
        return out.detach(), x.grad

    expected = run(torch.float32)
    with pytest.raises(RuntimeError):
        run(torch.bfloat16)
    with optim_wrapper.optim_context(model):
        found = run(torch.bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        # Rounded once, at the end.
        assert torch.equal(ours, theirs.bfloat16())
    with pytest.raises(RuntimeError):  # the operators are left as they were
        run(torch.bfloat16)


def test_backward_outside_the_context_works_too(wrapper):
    model, optim_wrapper = wrapper
    with optim_wrapper.optim_context(model):
        maps = model(torch.randn(1, 2, 8, 8))
        rois = torch.tensor([[0, 1, 1, 6, 6]]).bfloat16()
        loss = RoIAlign((2, 2))(maps, rois).float().sum()
    before = model.weight.detach().clone()
    optim_wrapper.update_params(loss)
    assert not torch.equal(model.weight, before)


def test_nms_takes_boxes_of_half_precision(wrapper):
    model, optim_wrapper = wrapper
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]])
    scores, classes = torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3).long()
    with optim_wrapper.optim_context(model):
        _, kept = batched_nms(
            boxes.bfloat16(),
            scores.bfloat16(),
            classes,
            dict(type='nms', iou_threshold=0.5),
        )
    assert kept.tolist() == [1, 2]
