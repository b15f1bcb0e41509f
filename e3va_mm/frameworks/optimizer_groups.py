"""Optimizer groups of models with a tuned backbone.

mmengine's default constructor and the layer-decay constructors of mmdet,
mmseg and mmpretrain share one ``__call__``, which :func:`patch_constructors`
replaces: a stock config needs no other constructor.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import nn

from e3va_mm.utils.tuned import side_path_backbones, tuned_backbones

# The layer-decay constructors. That of mmdet and mmseg sets weight decay by
# itself, that of mmpretrain by the rules of the config.
LAYER_DECAY = 'LearningRateDecayOptimizerConstructor'
LAYER_DECAY_BY_RULES = 'LearningRateDecayOptimWrapperConstructor'
DECAY_RULES = ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult')

_stock_call = DefaultOptimWrapperConstructor.__call__


def patch_constructors() -> None:
    """Let stock constructors give our groups for tuned backbones.

    Models without one, and constructors that add parameters in a way of their
    own, keep exactly the stock groups.
    """
    DefaultOptimWrapperConstructor.__call__ = _call


@wraps(_stock_call)
def _call(
    self: DefaultOptimWrapperConstructor, model: nn.Module
) -> OptimWrapper:
    kind = self.optimizer_cfg['type']
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            # mmengine would call None.
            raise KeyError(f'{kind} is not in the optimizer registry.')
    inner = getattr(model, 'module', model)
    if isinstance(self, SidePathOptimWrapperConstructor) or not any(
        tuned_backbones(inner)
    ):
        return _stock_call(self, model)
    owner = next(c for c in type(self).__mro__ if 'add_params' in vars(c))
    rules = self.paramwise_cfg
    if owner.__name__ in (LAYER_DECAY, LAYER_DECAY_BY_RULES):
        parts = list(_added_parts(inner))
        if not parts:
            return _stock_call(self, model)
        print_log(
            f'{type(self).__name__}: no layer of the frozen trunk has a rate '
            'to decay; what the tuner adds and heads train at the base '
            'learning rate.',
            logger='current',
        )
        rules = _layer_decay_rules(self, owner.__name__, parts)
    elif owner is not DefaultOptimWrapperConstructor:
        return _stock_call(self, model)
    options = dict(self.optim_wrapper_cfg, optimizer=self.optimizer_cfg)
    return SidePathOptimWrapperConstructor(options, rules)(inner)


class SidePathOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, aware of side paths and tuners.

    A model without either gets exactly the default's groups. Otherwise:

    * Only parameters that train are in a group.
    * Side paths and the output norms that train with them have the base
      learning rate. Most stock configs of transformers scale the rate of all
      that has ``backbone`` in its name, which is meant for pre-trained
      weights; here those are frozen. To scale a side path or an output norm,
      name it: ``custom_keys={'side_path': dict(lr_mult=...)}``,
      ``'backbone.norm0'``, ``'backbone.ln1'`` of a ViT. Weight decay follows
      the keys as usual.
    * So has what other tuners add, named ``'petl'``; what they train of the
      stock backbone follows the rules that are meant for that.

    Takes the arguments of ``DefaultOptimWrapperConstructor``.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``."""
        inner = getattr(model, 'module', model)
        self._beside = {id(b) for _, b in side_path_backbones(inner)}
        # What a tuner has added inside of a backbone -> where the backbone is.
        self._inside = {
            id(backbone.petl): prefix.removesuffix('.')
            for prefix, backbone in tuned_backbones(inner)
            if id(backbone) not in self._beside
        }
        if not self._beside and not self._inside:
            return _stock_call(self, model)
        if self.paramwise_cfg:
            return _stock_call(self, inner)
        # Without rules the default takes all that `parameters()` gives.
        trainable = [p for p in inner.parameters() if p.requires_grad]
        return _stock_call(self, SimpleNamespace(parameters=lambda: trainable))

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """See the base class."""
        if id(module) in self._beside:
            parts = dict(module.trainable_children())
            with self._own_rates(prefix, parts):
                for name, part in parts.items():
                    path = f'{prefix}.{name}'.lstrip('.')
                    super().add_params(params, part, path)
        elif id(module) in self._inside:
            with self._own_rates(self._inside[id(module)], ['petl']):
                super().add_params(params, module, prefix, is_dcn_module)
        elif id(getattr(module, 'petl', None)) in self._inside:
            with _frozen_hidden(module):
                super().add_params(params, module, prefix, is_dcn_module)
        else:
            super().add_params(params, module, prefix, is_dcn_module)

    @contextmanager
    def _own_rates(self, prefix: str, parts: Iterable[str]) -> Iterator[None]:
        """Inside, no rule scales a learning rate unless it names a part."""
        everywhere = self.paramwise_cfg
        rules = copy.deepcopy(everywhere)
        rules.pop('bias_lr_mult', None)
        for key, options in rules.get('custom_keys', {}).items():
            if not any(names_part(key, prefix, part) for part in parts):
                options.pop('lr_mult', None)
                options.pop('lr', None)
        self.paramwise_cfg = rules
        try:
            yield
        finally:
            self.paramwise_cfg = everywhere


def names_part(key: str, prefix: str, part: str) -> bool:
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


def _added_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of tuned backbones and of what trains beside their weights."""
    beside = {id(backbone) for _, backbone in side_path_backbones(model)}
    for prefix, backbone in tuned_backbones(model):
        path = prefix.removesuffix('.')
        if id(backbone) in beside:
            for name, _ in backbone.trainable_children():
                yield path, name
        elif any(True for _ in backbone.petl.parameters()):
            yield path, 'petl'


def _layer_decay_rules(
    stock: DefaultOptimWrapperConstructor,
    owner: str,
    parts: list[tuple[str, str]],
) -> dict:
    """What a layer-decay constructor heeds, as mmengine's default knows it.

    Keys that name a part scale its rate; heads keep the stock figures.
    """
    paramwise_cfg = stock.paramwise_cfg
    keys = {}
    for key, options in paramwise_cfg.get('custom_keys', {}).items():
        if any(names_part(key, *part) for part in parts):
            keys[key] = dict(options)
        elif owner == LAYER_DECAY_BY_RULES:  # it scales no rate by them
            keys[key] = {
                name: value
                for name, value in options.items()
                if name not in ('lr', 'lr_mult')
            }
    # Stock groups hold what modules share once.
    rules = dict(custom_keys=keys, bypass_duplicate=True)
    if stock.base_wd is None:
        return rules
    if owner == LAYER_DECAY:
        return dict(rules, flat_decay_mult=0.0, bias_decay_mult=0.0)
    given = {k: paramwise_cfg[k] for k in DECAY_RULES if k in paramwise_cfg}
    return {**rules, **given}


@contextmanager
def _frozen_hidden(module: nn.Module) -> Iterator[None]:
    """Inside, hide what is frozen, of which the default logs a line each."""
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
