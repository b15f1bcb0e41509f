"""Small trunks and states that many tests share."""

import copy
from pathlib import Path

import torch
from mmengine.registry import DefaultScope

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
    return MODELS.build(
        {
            'type': f'{scope}.SwinTransformer',
            **TINY,
            'drop_path_rate': 0.0,
            **kwargs,
        }
    )


def build_e3va(scope='mmdet', **kwargs):
    """An E3VA Swin under a default scope; random trunks are allowed."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(
            {
                'type': 'e3va_mm.E3VASwinTransformer',
                'allow_random_trunk': True,
                **TINY,
                **kwargs,
            }
        )


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
    """An initialised E3VA Swin and the stock one with the same weights."""
    stock = randomised(build_stock(scope, **(stock_kwargs or {})), seed)
    stock.eval()
    ours = build_e3va(scope, **(stock_kwargs or {}), **kwargs)
    ours.init_weights()
    ours.load_state_dict(copy.deepcopy(stock.state_dict()), strict=False)
    return ours, stock


def threads_of_groups():
    """How many threads of gloo this process has; Linux tells."""
    names = [
        task.joinpath('comm').read_text()
        for task in Path('/proc/self/task').glob('*')
    ]
    return sum('gloo' in name for name in names)
