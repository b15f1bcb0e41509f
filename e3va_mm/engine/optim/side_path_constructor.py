"""Optimizer groups for models of whose backbone a part trains."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_REGISTRY
from torch import nn

from e3va_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


# Registered once more under mmengine's default name: a stock config names no
# constructor, and one changed `type` must be enough to get the groups right.
@MMENGINE_REGISTRY.register_module(
    name='DefaultOptimWrapperConstructor', force=True
)
@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SidePathOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, aware of side paths and rivals of them.

    A model without either gets exactly the default's groups. Otherwise:

    * Only parameters that train are in a group.
    * Side paths and the output norms that train with them have the base
      learning rate. Most stock configs of transformers scale the rate of all
      that has ``backbone`` in its name, which is meant for pre-trained
      weights; here those are frozen. To scale a side path or an output norm,
      name it: ``custom_keys={'side_path': dict(lr_mult=...)}``,
      ``'backbone.norm0'``, ``'backbone.ln1'`` of a ViT. Weight decay follows
      the keys as usual.
    * So has what a ``PETLBackbone`` adds, named ``'petl'``; what it trains of
      the stock backbone follows the rules that are meant for that.

    Takes the arguments of ``DefaultOptimWrapperConstructor``.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``."""
        inner = model.module if hasattr(model, 'module') else model
        # What a method has added to a backbone -> where the backbone is.
        self._added: dict[int, str] = {}
        if not any(
            has_side_path(m) or is_tuned_inside(m) for m in inner.modules()
        ):
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
        everywhere = self.paramwise_cfg
        if is_tuned_inside(module):
            self._added[id(module.petl)] = prefix
            with _trainable_alone(module):
                super().add_params(params, module, prefix, is_dcn_module)
            return
        if id(module) in self._added:
            parent = self._added.pop(id(module))
            self.paramwise_cfg = _side_path_rules(everywhere, parent, ['petl'])
            try:
                super().add_params(params, module, prefix, is_dcn_module)
            finally:
                self.paramwise_cfg = everywhere
            return
        if not has_side_path(module):
            super().add_params(params, module, prefix, is_dcn_module)
            return
        children = dict(module.trainable_children())
        self.paramwise_cfg = _side_path_rules(everywhere, prefix, children)
        try:
            for name, child in children.items():
                super().add_params(
                    params, child, f'{prefix}.{name}'.lstrip('.')
                )
        finally:
            self.paramwise_cfg = everywhere


def has_side_path(module: nn.Module) -> bool:
    """Whether a module is a backbone with a side path."""
    return hasattr(module, 'trainable_children')


def is_tuned_inside(module: nn.Module) -> bool:
    """Whether a module is a backbone with a tuning method inside."""
    return hasattr(module, 'petl') and not has_side_path(module)


@contextmanager
def _trainable_alone(module: nn.Module) -> Iterator[None]:
    """Hide what is frozen, of which the default logs a line each."""
    parameters = {each: each._parameters for each in module.modules()}
    for each, own in parameters.items():
        each._parameters = {
            name: parameter
            for name, parameter in own.items()
            if parameter is not None and parameter.requires_grad
        }
    try:
        yield
    finally:
        for each, own in parameters.items():
            each._parameters = own


def names_a_part(key: str, prefix: str, part: str) -> bool:
    """Whether a key of ``custom_keys`` can mean nothing else than a part.

    Args:
        key (str): The key.
        prefix (str): Path of the backbone, such as ``'backbone'``.
        part (str): Path of a part in it that trains: ``'side_path'``, or an
            output norm. The key has to begin with it, or with the end of the
            prefix and it; ``side_path`` may be anywhere.
    """
    if 'side_path' in key:
        return True
    parents = prefix.split('.') if prefix else []
    return any(
        f'{key}.'.startswith('.'.join([*parents[start:], part, '']))
        for start in range(len(parents) + 1)
    )


def _side_path_rules(
    paramwise_cfg: dict, prefix: str, parts: Iterable[str]
) -> dict:
    """The rules without the learning rates that were meant for others."""
    rules = copy.deepcopy(paramwise_cfg)
    rules.pop('bias_lr_mult', None)
    for key, options in rules.get('custom_keys', {}).items():
        if not any(names_a_part(key, prefix, part) for part in parts):
            options.pop('lr_mult', None)
            options.pop('lr', None)
    return rules
