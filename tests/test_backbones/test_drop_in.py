"""Every stock Swin config takes an E3VA backbone by one changed line."""

import importlib.util
import json
import warnings
from functools import lru_cache
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from e3va_mm.registry import MODELS

# The dormant original has three less.
STOCK = dict(mmdet=97 if mmdet.__version__ == '3.3.0' else 100, mmseg=23)
# Sizes that no window and no merging divides.
SIZES = [(65, 97), (43, 31)]


def stock_configs(framework):
    """(path, config) of the framework's configs with a Swin backbone."""
    package = Path(importlib.util.find_spec(framework).origin).parent
    root = package / '.mim' / 'configs'
    for path in sorted(root.glob('**/*.py')):
        if '_base_' in path.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                config = Config.fromfile(path)
        except (ImportError, FileNotFoundError):
            continue  # needs mmpretrain, or a file that upstream lost
        backbone = config.get('model', {}).get('backbone', {})
        if backbone.get('type') == 'SwinTransformer':
            yield path, config


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(1, 1)


@lru_cache(maxsize=1)
def checked_backbone(framework, arguments):
    """Build, initialise, run forward and backward; once per distinct one."""
    with DefaultScope.overwrite_default_scope(framework):
        backbone = MODELS.build(
            dict(
                json.loads(arguments),
                type='e3va_mm.E3VASwinTransformer',
                allow_random_trunk=True,
            )
        )
    backbone.init_weights()
    backbone.train()
    for size in SIZES:
        outputs = backbone(
            torch.randn(1, backbone.patch_embed.projection.in_channels, *size)
        )
        assert [o.shape[1] for o in outputs] == [
            backbone.num_features[i] for i in backbone.out_indices
        ]
        backbone.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all(), name
            else:
                assert parameter.grad is None, name
    return backbone


@pytest.mark.parametrize('framework', STOCK)
def test_every_stock_swin_config(framework):
    configs = [
        (
            json.dumps(
                {
                    # Weights may be out of reach; loading has its tests.
                    key: value
                    for key, value in config.model.backbone.to_dict().items()
                    if key not in ('type', 'init_cfg', 'pretrained')
                },
                sort_keys=True,
            ),
            path,
            config,
        )
        for path, config in stock_configs(framework)
    ]
    reached = 0
    for arguments, path, config in sorted(configs, key=lambda c: c[:2]):
        model = Model(checked_backbone(framework, arguments))
        trainable = [k for k, p in model.named_parameters() if p.requires_grad]
        options = config.optim_wrapper.to_dict()
        options['type'] = 'OptimWrapper'
        wrapper = build_optim_wrapper(model, options)
        names = {id(p): k for k, p in model.named_parameters()}
        rates = {
            names[id(p)]: group['lr']
            for group in wrapper.optimizer.param_groups
            for p in group['params']
        }
        assert sorted(rates) == sorted(trainable), path
        base = options['optimizer']['lr']
        assert all(
            rates[k] == base for k in trainable if k.startswith('backbone.')
        ), path
        reached += 1
    assert reached == STOCK[framework]
