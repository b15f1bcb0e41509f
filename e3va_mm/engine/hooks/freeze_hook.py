import gc
import weakref
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.errors import ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.paths import (
    check_patterns,
    matching,
    parameters_of,
    parts_of,
)
from e3va_mm.utils.tuned import side_path_backbones
from e3va_mm.utils.wrappers import unwrapped

Part = nn.Module | nn.Parameter


@HOOKS.register_module()
class FreezeHook(Hook):
    """Freezes parts of a model by their exact paths: necks and heads, too.

    What is frozen requires no gradient, and its norms and dropouts are in
    eval mode in every training iteration. Heads themselves, the modules that
    compute a loss, keep the mode of the model: they ask it what to compute.

    mmengine has built the optimizer, and wrapped the model for several
    processes, before any hook acts. Before the first step, and before a
    checkpoint is loaded, this hook takes what is frozen out of the
    optimizer's groups, which stay as many as they were, and wraps the model
    anew: no process waits for a gradient that never comes, and
    ``find_unused_parameters`` is not needed. To resume, the config has to
    freeze what it has frozen before.

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
                'FreezeHook needs the runner of type Runner, but got '
                f'{type(runner).__name__}, whose strategy has loaded the '
                'state of the optimizer before any hook acts. Leave '
                '`runner_type` and `strategy` out of the config.'
            )
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # a run that tests
        _check_wrapper(runner.model)
        model = unwrapped(runner.model)
        parts = parts_of(model)
        chosen = _select(model, parts, self.freeze)
        spared = _select(model, parts, self.train)
        _check_spared(spared, chosen)
        frozen = _parameters(chosen) - _parameters(spared)
        _check_side_paths(model, chosen, frozen)
        trained = {p for p in model.parameters() if p.requires_grad}
        if trained <= frozen:
            raise ConfigError(
                f'FreezeHook: freeze={list(self.freeze)} with '
                f'train={list(self.train)} leaves nothing to train in '
                f'{type(model).__name__}. Take a path out of `freeze`, or '
                'name what trains in `train`.'
            )
        self._quiet = list(_modules(chosen) - _modules(spared))
        runner.logger.info(_report(chosen, spared, frozen, trained))
        for parameter in frozen:
            parameter.requires_grad_(False)
        _take_out(runner.optim_wrapper, frozen)
        if trained & frozen and is_model_wrapper(runner.model):
            _wrap_anew(runner)

    def before_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Put back in eval mode what ``model.train()`` has changed."""
        for module in self._quiet:
            module.training = False


def _select(
    model: nn.Module, parts: dict[str, Part], patterns: Sequence[str]
) -> dict[str, Part]:
    """The parts that patterns fit, by their paths."""
    what = f'module or parameter of {type(model).__name__}'
    return {
        path: parts[path]
        for pattern in patterns
        for path in matching(pattern, parts, what)
    }


def _parameters(chosen: dict[str, Part]) -> set[nn.Parameter]:
    return {p for part in chosen.values() for p in parameters_of(part)}


def _modules(chosen: dict[str, Part]) -> set[nn.Module]:
    """Modules below the chosen parts whose mode is not that of a head."""
    return {
        module
        for part in chosen.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
        if not hasattr(module, 'loss')
    }


def _check_wrapper(model: nn.Module) -> None:
    """Refuse wrappers that cannot be taken off and put on again."""
    if not is_model_wrapper(model):
        return
    inner = [m for m in model.module.modules() if is_model_wrapper(m)]
    if not isinstance(model, DistributedDataParallel) or inner:
        raise ConfigError(
            'FreezeHook needs a model wrapped as a whole in '
            f'DistributedDataParallel, but got {type(model).__name__}. Set '
            "`model_wrapper_cfg=dict(type='MMDistributedDataParallel')`."
        )


def _check_spared(spared: dict[str, Part], chosen: dict[str, Part]) -> None:
    """Refuse exceptions from nothing."""
    inside: set[Part] = set(_parameters(chosen))
    for part in chosen.values():
        if isinstance(part, nn.Module):
            inside.update(part.modules())
    for path, part in spared.items():
        if part not in inside:
            raise ConfigError(
                f'FreezeHook: `train` names {path!r}, which no path of '
                '`freeze` encloses: it is left as it is anyway. Take it out.'
            )


def _check_side_paths(
    model: nn.Module, chosen: dict[str, Part], frozen: set[nn.Parameter]
) -> None:
    """Refuse to freeze what a backbone declares to train."""
    for prefix, backbone in side_path_backbones(model):
        for name, child in backbone.trainable_children():
            own = frozen & {*child.parameters()}
            if not own:
                continue
            paths = [
                path
                for path, part in chosen.items()
                if not own.isdisjoint(parameters_of(part))
            ]
            where = prefix.rstrip('.')
            raise ConfigError(
                f'FreezeHook: {paths[0]!r} would freeze '
                f"'{prefix}{name}', which is what trains beside the frozen "
                f'trunk of {where or type(model).__name__!r}. Take the path '
                f"out of `freeze`, or add train=['{prefix}{name}']; output "
                'norms do not train with '
                '`side_path=dict(train_output_norms=False)` of the backbone.'
            )


def _report(
    chosen: dict[str, Part],
    spared: dict[str, Part],
    frozen: set[nn.Parameter],
    trained: set[nn.Parameter],
) -> str:
    """One line for each part that was found."""
    lines = ['FreezeHook: what the paths have found']
    for path, part in chosen.items():
        own = frozen & {*parameters_of(part)}
        line = f'  frozen: {path}, {_count(own):,} parameters'
        already = _count(own - trained)
        lines.append(line + f' ({already:,} were already)' * bool(already))
    for path, part in spared.items():
        own = trained & {*parameters_of(part)}
        lines.append(f'  trains: {path}, {_count(own):,} parameters')
    return '\n'.join(lines)


def _count(parameters: set[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _take_out(wrapper: OptimWrapper, frozen: set[nn.Parameter]) -> None:
    """Take parameters out of the groups; the groups stay, if empty.

    Schedulers and checkpoints know groups by their number.
    """
    wrappers = (
        wrapper.optim_wrappers.values()
        if isinstance(wrapper, OptimWrapperDict)
        else [wrapper]
    )
    for each in wrappers:
        # Has dealt parameters out to processes; leaves those alone that have
        # no gradient, as every optimizer does.
        if isinstance(each.optimizer, ZeroRedundancyOptimizer):
            continue
        for group in each.optimizer.param_groups:
            group['params'] = [p for p in group['params'] if p not in frozen]


def _wrap_anew(runner: Runner) -> None:
    """Wrap the model as at first, now that less of it trains."""
    old = weakref.ref(runner.model)
    kind = type(runner.model)
    runner.model = runner.model.module
    # The old wrapper hooks into the gradients until it is gone.
    gc.collect()
    if old() is not None:
        raise ConfigError(
            'FreezeHook has to wrap the model anew, but something holds the '
            'old wrapper. Name it as the first of `custom_hooks`.'
        )
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), runner.model
    )
    if type(runner.model) is not kind:
        raise ConfigError(
            'FreezeHook has to wrap the model anew as the config says, in '
            f'{type(runner.model).__name__}, but it came in {kind.__name__}. '
            'Give the runner a model without a wrapper.'
        )
