"""Small Swin Transformers that many tests share."""

import copy
from pathlib import Path

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from e3va_mm.registry import MODELS

TINY = dict(
    embed_dims=32, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=7
)
SWIN = dict(
    t=dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    s=dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    b=dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    l=dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
)


def build_stock(scope='mmdet', **kwargs):
    kind = f'{scope}.SwinTransformer'
    return MODELS.build(
        dict(TINY, type=kind, **{'drop_path_rate': 0, **kwargs})
    )


def build_e3va(scope='mmdet', **kwargs):
    """A tuned Swin under a default scope; random trunks are allowed."""
    kind = dict(type='e3va_mm.E3VASwinTransformer', allow_random_trunk=True)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build({**kind, **TINY, **kwargs})


def randomised(module, seed=0):
    """``module`` with every float tensor drawn, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator).to(
                value.dtype
            )
            scale = 0.02 if value.ndim > 1 else 0.1
            one = value.ndim == 1 and name.endswith('weight')
            value.copy_(noise * scale + (1.0 if one else 0.0))
    return module


def e3va_and_stock(scope='mmdet', seed=0, stock_kwargs=None, **kwargs):
    """A tuned Swin and the stock one with the same weights."""
    stock = randomised(build_stock(scope, **(stock_kwargs or {})), seed)
    stock.eval()
    ours = build_e3va(scope, **(stock_kwargs or {}), **kwargs)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()), strict=False)
    return ours, stock


class Detector(nn.Module):
    """As much of a detector as loading and saving see."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(2, 2)


def assert_same_state(state, expected):
    """The same names in the same order, types and bits."""
    assert list(state) == list(expected)
    for name, value in state.items():
        assert type(value) is Tensor, name
        assert value.dtype is expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def threads_of_groups():
    """How many threads of gloo this process has; Linux tells."""
    names = [
        task.joinpath('comm').read_text()
        for task in Path('/proc/self/task').glob('*')
    ]
    return sum('gloo' in name for name in names)
