"""A backbone that is counted without being there.

Its tensors are on torch's meta device, which has their sizes and no memory for
them. What comes after it computes with zeros in place of its outputs: heads
that choose by scores, such as an RPN's, choose fewer.
"""

import weakref
from collections.abc import Mapping
from functools import wraps

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from e3va_mm.backbones import TunedBackbone


def backbone_on_meta(backbone: Mapping) -> nn.Module:
    """Build a backbone on the meta device, for a model on the CPU.

    Args:
        backbone (Mapping): Its config.

    Returns:
        nn.Module: It takes images on any device, and gives outputs on the
        CPU.
    """
    with _NewOnMeta():
        built = MODELS.build(backbone)
    built.to('meta')
    if isinstance(built, TunedBackbone):  # no weights will come
        built.storage.store(built.trunk)
    forward = built.forward

    @wraps(forward)
    def run(image: Tensor):
        outputs = forward(image.to('meta'))
        return tree_map_only(Tensor, _ToHost.apply, outputs)

    built.forward = run
    return built


class _NewOnMeta(TorchFunctionMode):
    """What parameters are made of is on the meta device.

    Not all, as under ``torch.device('meta')``: constructors read values of
    ``linspace``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn):
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


class _ToHost(torch.autograd.Function):
    """Zeros for a tensor on the meta device, and back."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        zeros = value.new_zeros((), device='cpu').expand(value.shape)
        # Whoever keeps them would keep the value.
        weakref.finalize(zeros.untyped_storage(), id, value.detach())
        return zeros

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_like(grad, device='meta')
