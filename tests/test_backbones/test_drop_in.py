"""Every stock Swin config takes a tuned backbone by one changed line."""

import gc
import importlib.util
import json
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from e3va_mm.registry import MODELS
from tests.helpers import Detector

STOCK = dict(mmdet=100, mmseg=23)
# Weights may be out of reach; loading has its tests.
LEFT_OUT = ('type', 'init_cfg', 'pretrained')


def stock_configs(framework):
    """(path, config) of the framework's configs with a Swin backbone."""
    package = Path(importlib.util.find_spec(framework).origin).parent
    for path in sorted((package / '.mim' / 'configs').glob('**/*.py')):
        if '_base_' in path.parts or 'swin' not in path.read_text().lower():
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


@lru_cache(maxsize=1)
def checked_backbone(framework, arguments):
    """Built, run forward and backward; once for each that is different."""
    gc.collect()  # the one before refers to itself
    own = dict(type='e3va_mm.E3VASwinTransformer', allow_random_trunk=True)
    with DefaultScope.overwrite_default_scope(framework):
        ours = MODELS.build({**json.loads(arguments), **own})
    ours.train()
    # A size that no window and no merging divides.
    channels = ours.patch_embed.projection.in_channels
    outputs = ours(torch.randn(1, channels, 65, 97))
    assert [o.shape[1] for o in outputs] == [
        ours.num_features[i] for i in ours.trunk.out_indices
    ]
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    return ours


@pytest.mark.parametrize('framework', STOCK)
def test_every_stock_swin_config(framework):
    configs = []
    for path, config in stock_configs(framework):
        own = config.model.backbone.to_dict()
        own = {key: v for key, v in own.items() if key not in LEFT_OUT}
        configs.append((json.dumps(own, sort_keys=True), path, config))
    assert len(configs) == STOCK[framework]
    for arguments, path, config in sorted(configs, key=lambda c: c[:2]):
        model = Detector(checked_backbone(framework, arguments))
        options = config.optim_wrapper.to_dict() | dict(type='OptimWrapper')
        wrapper = build_optim_wrapper(model, options)
        names = {id(p): name for name, p in model.named_parameters()}
        rates = {
            names[id(p)]: group['lr']
            for group in wrapper.optimizer.param_groups
            for p in group['params']
        }
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(rates) == trained, path
        # Rates that scale a pre-trained backbone do not scale what is new.
        ours = {v for k, v in rates.items() if k.startswith('backbone.')}
        assert ours == {options['optimizer']['lr']}, path
