"""Constructors that decay the rate layer by layer, where nothing is left to.

Stock configs of BEiT, MAE and ConvNeXt scale the learning rate of a layer by
its depth in the backbone. The frameworks know the depth by the backbone's
class and refuse any other; beside a side path all of those layers are frozen.
"""

import sys

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

from e3va_mm.engine.optim.side_path_constructor import (
    SidePathOptimWrapperConstructor,
    has_side_path,
    names_a_part,
)

CONSTRUCTORS = dict(
    mmdet=('LearningRateDecayOptimizerConstructor',),
    mmseg=(
        'LearningRateDecayOptimizerConstructor',
        'LayerDecayOptimizerConstructor',
    ),
    mmpretrain=('LearningRateDecayOptimWrapperConstructor',),
)
# Those of mmdet and mmseg have a rule of their own; mmpretrain's reads these.
OWN_RULE = dict(flat_decay_mult=0.0, bias_decay_mult=0.0)
READ = ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult')


def cover_layer_decay() -> None:
    """Let the frameworks' layer-decay constructors take side paths.

    Those of the frameworks that are imported by now are registered once more
    under their names, see :class:`SidePathLayerDecay`. More calls change
    nothing.
    """
    for framework, names in CONSTRUCTORS.items():
        module = sys.modules.get(f'{framework}.registry')
        if module is None:
            continue
        registry = module.OPTIM_WRAPPER_CONSTRUCTORS
        try:
            # Else it would register the stock ones later.
            registry.import_from_location()
        except Exception:  # whatever a half-installed framework raises
            continue  # it says so itself where it is asked for
        for name in names:
            stock = registry.module_dict.get(name)
            if stock is None or issubclass(stock, SidePathLayerDecay):
                continue
            ours = type(
                stock.__name__,
                (SidePathLayerDecay, stock),
                dict(
                    __doc__=stock.__doc__,
                    __module__=__name__,
                    has_own_rule=framework != 'mmpretrain',
                ),
            )
            registry.register_module(name=name, module=ours, force=True)


class SidePathLayerDecay:
    """Mixed into a stock constructor that decays the rate by layer.

    A model without a side path gets exactly the stock groups. Otherwise those
    of :class:`SidePathOptimWrapperConstructor`: side path and heads at the
    base learning rate, which heads have in the stock groups too, with the
    weight decay of the stock ones. Keys that name a side path scale it.
    """

    has_own_rule: bool

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``."""
        inner = model.module if hasattr(model, 'module') else model
        parts = [
            (prefix, part)
            for prefix, module in inner.named_modules()
            if has_side_path(module)
            for part, _ in module.trainable_children()
        ]
        if not parts:
            return super().__call__(model)
        print_log(
            f'{type(self).__name__}: no layer of the frozen trunk has a rate '
            'to decay; side path and heads train at the base learning rate.',
            logger='current',
        )
        constructor = SidePathOptimWrapperConstructor(
            dict(self.optim_wrapper_cfg, optimizer=self.optimizer_cfg),
            self._rules(parts),
        )
        return constructor(inner)

    def _rules(self, parts: list[tuple[str, str]]) -> dict:
        """What the stock constructor heeds, as mmengine's default knows it."""
        given = self.paramwise_cfg
        keys = {}
        for key, options in given.get('custom_keys', {}).items():
            if any(names_a_part(key, *part) for part in parts):
                keys[key] = dict(options)
            elif not self.has_own_rule:  # mmpretrain's scales no rate by them
                keys[key] = {
                    k: v
                    for k, v in options.items()
                    if k not in ('lr', 'lr_mult')
                }
        # Stock groups hold what modules share once.
        rules = dict(custom_keys=keys, bypass_duplicate=True)
        if self.base_wd is None:
            return rules
        if self.has_own_rule:
            return {**rules, **OWN_RULE}
        return {**rules, **{k: given[k] for k in READ if k in given}}
