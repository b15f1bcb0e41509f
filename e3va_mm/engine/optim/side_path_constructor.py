"""Optimizer groups for models whose backbone has a side path."""

import copy
import re
from types import SimpleNamespace

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_REGISTRY
from torch import nn

from ...registry import OPTIM_WRAPPER_CONSTRUCTORS

# A key that can mean nothing else: `side_path...` or an output norm.
NAMES_A_SIDE_PATH = re.compile(r'side_path|^(backbone\.)?norm\d')


# Registered once more under mmengine's default name: a stock config names no
# constructor, and one changed `type` must be enough to get the groups right.
@MMENGINE_REGISTRY.register_module(
    name='DefaultOptimWrapperConstructor', force=True
)
@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SidePathOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, aware of side paths.

    A model without a side path gets exactly the default's groups. Otherwise:

    * Only parameters that train are in a group.
    * Side paths and their output norms train at the base learning rate. Most
      stock Swin configs scale the rate of all that has ``backbone`` in its
      name, which is meant for pre-trained weights; here those are frozen. To
      scale a side path or an output norm, name it:
      ``custom_keys={'side_path': dict(lr_mult=...)}``, ``'backbone.norm0'``.
      Weight decay follows the keys as usual.

    Takes the arguments of ``DefaultOptimWrapperConstructor``.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``."""
        inner = model.module if hasattr(model, 'module') else model
        if not any(_has_side_path(m) for m in inner.modules()):
            return super().__call__(model)
        if self.paramwise_cfg:
            return super().__call__(inner)
        # Without rules the default takes all that `parameters()` gives.
        trainable = [p for p in inner.parameters() if p.requires_grad]
        return super().__call__(SimpleNamespace(parameters=lambda: trainable))

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """See the base class."""
        if not _has_side_path(module):
            super().add_params(params, module, prefix, is_dcn_module)
            return
        everywhere = self.paramwise_cfg
        self.paramwise_cfg = _side_path_rules(everywhere)
        try:
            for name, child in module.trainable_children():
                super().add_params(
                    params, child, f'{prefix}.{name}'.lstrip('.')
                )
        finally:
            self.paramwise_cfg = everywhere


def _has_side_path(module: nn.Module) -> bool:
    return hasattr(module, 'trainable_children')


def _side_path_rules(paramwise_cfg: dict) -> dict:
    """The rules without the learning rates that were meant for others."""
    rules = copy.deepcopy(paramwise_cfg)
    rules.pop('bias_lr_mult', None)
    for key, options in rules.get('custom_keys', {}).items():
        if not NAMES_A_SIDE_PATH.search(key):
            options.pop('lr_mult', None)
            options.pop('lr', None)
    return rules
