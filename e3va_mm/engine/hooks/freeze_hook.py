import gc
from collections.abc import Iterable, Sequence

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from e3va_mm.engine.runner_optimizers import optimizers_of
from e3va_mm.errors import ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.module_paths import check_patterns, parameters_of, select
from e3va_mm.utils.tuned import side_path_backbones
from e3va_mm.utils.unwrapping import unwrapped


@HOOKS.register_module()
class FreezeHook(Hook):
    """Freezes parts of a model by their exact paths: necks and heads, too.

    What is frozen requires no gradient, and its norms and dropouts are in
    eval mode in every training iteration. Heads themselves, the modules that
    compute a loss, keep the mode of the model: they ask it what to compute.

    mmengine has built the optimizer, and wrapped the model for several
    processes, before any hook acts. Before a checkpoint is loaded, this hook
    takes what is frozen out of the optimizer's groups, which stay as many as
    they were, and wraps the model anew, so ``find_unused_parameters`` is not
    needed. To resume, the config has to freeze what it has frozen before.

    A frozen trunk needs no hook, and its side path is not frozen by one.

    Args:
        freeze (Sequence[str]): Paths of modules and parameters in the model,
            ``*`` standing for any one part: ``['neck',
            'roi_head.bbox_head.*']``.
        train (Sequence[str]): Paths inside these that are left as they are.
            Defaults to none.

    Raises:
        ConfigError: If a path matches nothing or a side path, if nothing is
            left to train, or if the runner or the wrapper of the model does
            not allow it.

    Examples:
        >>> custom_hooks = [
        ...     dict(
        ...         type='e3va_mm.FreezeHook',
        ...         freeze=['neck', 'bbox_head'],
        ...         train=['bbox_head.retina_cls'])
        ... ]
    """

    # Before EMAHook copies the model.
    priority = 'VERY_HIGH'

    def __init__(
        self, freeze: Sequence[str], train: Sequence[str] = ()
    ) -> None:
        check_patterns(freeze, 'FreezeHook: `freeze`')
        check_patterns(train, 'FreezeHook: `train`')
        self.freeze = freeze
        self.train = train
        self._quiet: list[nn.Module] = []

    def before_run(self, runner: Runner) -> None:
        """Freeze, before anything is loaded or stepped."""
        if not isinstance(runner, Runner):
            raise ConfigError(
                f'FreezeHook needs mmengine.Runner, but got '
                f'{type(runner).__name__}, which loads the optimizer before '
                'any hook acts. Leave out `runner_type` and `strategy`.'
            )
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # a run that tests
        is_wrapped = is_model_wrapper(runner.model)
        if is_wrapped and not isinstance(runner.model, DDP):
            raise ConfigError(
                'FreezeHook needs a model wrapped in DistributedDataParallel, '
                f'but got {type(runner.model).__name__}. Set '
                "`model_wrapper_cfg=dict(type='MMDistributedDataParallel')`."
            )
        model = unwrapped(runner.model)
        chosen, spared = select(model, self.freeze), select(model, self.train)
        inside = parameters_of(*chosen.values())
        for path, part in spared.items():
            if not parameters_of(part) <= inside:
                raise ConfigError(
                    f'FreezeHook: `train` names {path!r}, which no path of '
                    '`freeze` encloses. Take it out.'
                )
        frozen = inside - parameters_of(*spared.values())
        _check_side_paths(model, frozen)
        trained = {p for p in model.parameters() if p.requires_grad}
        if trained <= frozen:
            raise ConfigError(
                f'FreezeHook: freeze={list(self.freeze)} with '
                f'train={list(self.train)} leaves nothing to train in '
                f'{type(model).__name__}. Take a path out of `freeze`, or '
                'name what trains in `train`.'
            )
        lines = ['FreezeHook:']
        for path, part in chosen.items():
            count = _count(frozen & parameters_of(part))
            lines.append(f'  frozen: {path}, {count:,} parameters')
        for path, part in spared.items():
            count = _count(trained & parameters_of(part))
            lines.append(f'  trains: {path}, {count:,} parameters')
        runner.logger.info('\n'.join(lines))
        self._quiet = list(
            _modules(chosen.values()) - _modules(spared.values())
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        for optimizer in optimizers_of(runner):
            # That one has dealt parameters out to processes, and leaves those
            # without a gradient alone.
            if not isinstance(optimizer, ZeroRedundancyOptimizer):
                # Schedulers and checkpoints know groups by their number.
                for group in optimizer.param_groups:
                    held = group['params']
                    group['params'] = [p for p in held if p not in frozen]
        if is_wrapped and trained & frozen:
            # The old wrapper hooks into the gradients until it is gone.
            runner.model = model
            gc.collect()
            runner.model = runner.wrap_model(
                runner.cfg.get('model_wrapper_cfg'), model
            )

    def before_train_iter(self, *args, **kwargs) -> None:
        """Put back in eval mode what ``model.train()`` has changed."""
        for module in self._quiet:
            module.training = False


def _modules(parts: Iterable[nn.Module | nn.Parameter]) -> set[nn.Module]:
    """Modules in parts whose mode is not that of a head."""
    return {
        module
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
        if not hasattr(module, 'loss')
    }


def _check_side_paths(model: nn.Module, frozen: set[nn.Parameter]) -> None:
    """Refuse to freeze what a backbone declares to train."""
    for prefix, backbone in side_path_backbones(model):
        for name, child in backbone.trainable_children():
            if not frozen.isdisjoint(child.parameters()):
                raise ConfigError(
                    f"FreezeHook would freeze '{prefix}{name}', which is what "
                    'trains beside a frozen trunk. Take its path out of '
                    f"`freeze`, or add train=['{prefix}{name}']; output norms "
                    'do not train with '
                    '`tuner=dict(train_output_norms=False)` of the backbone.'
                )


def _count(parameters: set[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
