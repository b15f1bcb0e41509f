import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from e3va_mm.engine.frozen_tensors import FrozenTensors
from e3va_mm.engine.hooks.adapter_checkpoint_hook import AdapterCheckpointHook
from e3va_mm.engine.hooks.resume_check_hook import optimizers_of
from e3va_mm.errors import ConfigError, TrainingError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.listing import listed
from e3va_mm.utils.paths import (
    check_patterns,
    matching,
    parameters_of,
    parts_of,
)
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.values import is_whole
from e3va_mm.utils.wrappers import unwrapped

# Up projections start at zero: what lies before one has a gradient from the
# second step on.
STEPS = 3
# Those gradients grow with it. In a warm-up from a thousandth of the learning
# rate they are too small for fp16 at first.
ZERO_STEPS = 100
# Names that a message lists.
_listed = partial(listed, shown=10)


@HOOKS.register_module()
class TrainingGuardHook(Hook):
    """Ends a run that cannot come to anything, and says why.

    It does so when

    * the loss is NaN or infinite: at once, with the loss terms and the
      pictures of the batch. The update of that iteration has been made
      already, so no checkpoint is written from then on: nor is one when
      trained weights are not finite though the loss was;
    * a parameter of a side path has had no gradient in the first three steps
      of the optimizer, or only zeros in the first hundred;
    * any other that trains has had none, and several processes
      (DistributedDataParallel without ``find_unused_parameters``) wait for
      it: after the first step;
    * a frozen parameter, or a buffer of a frozen module such as the
      statistics of a norm, has changed: 64 values of each are compared at
      the first three iterations and at every ``interval``, all values when
      training ends.

    Elsewhere a parameter outside of side paths that has had no gradient in
    three steps is a warning. What trains is what requires a gradient at the
    first iteration and still does: backbones may freeze in ``train()``, hooks
    later. Averaged models inside of the model may change, and the ``teacher``
    of MMDetection's MeanTeacherHook.

    In several processes each looks for itself, and the one that finds
    something ends: the launcher then stops the others, which wait for its
    gradients. To agree first would take a message between all of them in each
    iteration. What each process looks at before a checkpoint, the weights, is
    the same in all.

    Args:
        interval (int): Iterations between two looks at the frozen tensors.
            Defaults to 100.
        without_gradient (Sequence[str]): Paths of parameters, or of modules,
            that may be without a gradient, ``*`` standing for any one part.
            Defaults to none.
        may_change (Sequence[str]): Paths of frozen modules, parameters or
            buffers that may change: where a hook of your own averages
            weights into them. Defaults to none.

    Raises:
        ConfigError: If a path matches nothing.
        TrainingError: As above.

    Examples:
        >>> custom_hooks = [dict(type='e3va_mm.TrainingGuardHook')]
    """

    # Before EMAHook takes a weight into its average and a file is written.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        interval: int = 100,
        without_gradient: Sequence[str] = (),
        may_change: Sequence[str] = (),
    ) -> None:
        if not is_whole(interval):
            raise ConfigError(
                'TrainingGuardHook: `interval` should be a whole number from '
                f'1 on, but got {interval!r}.'
            )
        check_patterns(
            without_gradient, 'TrainingGuardHook: `without_gradient`'
        )
        check_patterns(may_change, 'TrainingGuardHook: `may_change`')
        self.interval = interval
        self.without_gradient = without_gradient
        self.may_change = may_change

    def before_train(self, runner: Runner) -> None:
        """Find what the options name."""
        model = self._model = unwrapped(runner.model)
        may_change = [*self.may_change, *_averaged(runner, model)]
        self._exempt = _below(model, may_change)
        self._excused = _excused(model, self.without_gradient)
        self._frozen: FrozenTensors | None = None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Remember what is frozen, all weights being where they belong.

        Not earlier: only now has the model been put in train mode.
        """
        if self._frozen is not None:
            return
        self._frozen = FrozenTensors(self._model, self._exempt)
        self._begun = self._looked = runner.iter
        self._gradients = _Gradients(
            self._model, self._excused, optimizers_of(runner)
        )
        self._waits = _waits(runner.model)
        self._seen_absent = self._seen_zero = False
        if not self._gradients.watched:
            runner.logger.info(
                "Training guard: gradients are not looked at, as torch's "
                'optimizer hooks are not to be had here.'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Look at the loss, and at the rest when it is time."""
        if not all(map(math.isfinite, _to_check(outputs or {}))):
            raise TrainingError(
                self._not_finite(runner, data_batch, outputs, 'the loss')
            )
        done = runner.iter + 1 - self._begun
        if done == 1:
            self._frozen.accept_new_forms()
        if done <= STEPS or self.every_n_train_iters(runner, self.interval):
            self._check_frozen(runner, runner.iter + 1)
        self._check_gradients(runner)
        if self._checkpoint_is_due(runner, batch_idx) and self._broken():
            raise TrainingError(
                self._not_finite(runner, data_batch, outputs, 'what trains')
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """The last look: at what is about to be written."""
        if not hasattr(self, '_model'):
            return
        state = checkpoint['state_dict']
        broken = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
            and name in state
            and not state[name].isfinite().all()
        ]
        if broken:
            raise TrainingError(
                'A checkpoint is not written, as it is not finite in '
                f'{_listed(broken)}. {_last_checkpoint(runner)}'
            )

    def after_train(self, runner: Runner) -> None:
        """Compare every value of what is frozen."""
        if self._frozen is None:
            return  # a resumed run that was at its end
        self._gradients.remove()
        self._looked = self._begun
        self._check_frozen(runner, runner.iter, full=True)
        runner.logger.info(
            f'Training guard: all of the {len(self._frozen.names)} frozen '
            'tensors are what they were.'
        )

    def _check_frozen(
        self, runner: Runner, now: int, full: bool = False
    ) -> None:
        changed = self._frozen.changed(full)
        if changed:
            raise TrainingError(
                f'{_where(now)}: what is frozen has changed since '
                f'iteration {self._looked}: {_listed(changed)}. Causes are '
                'code that writes into it, an optimizer that was built '
                'before it was frozen, and a norm in train mode. What is '
                'meant to change goes into '
                '`TrainingGuardHook(may_change=[...])`. '
                f'{_last_checkpoint(runner)}'
            )
        self._looked = now

    def _check_gradients(self, runner: Runner) -> None:
        gradients = self._gradients
        steps = gradients.steps
        if not gradients.looks:
            return
        if not self._seen_absent and steps >= (1 if self._waits else STEPS):
            self._seen_absent = True
            self._check_absent(runner)
        if steps < STEPS:
            return
        zero = gradients.zero()
        if not zero:
            gradients.remove()
        elif not self._seen_zero:
            self._seen_zero = True
            runner.logger.warning(
                f'Training guard: in {_count(steps)} all gradients were zero '
                f'in the side path for {_listed(zero)}. It is an error if '
                f'they still are after {ZERO_STEPS}.'
            )
        elif steps >= ZERO_STEPS:
            gradients.remove()
            raise TrainingError(
                f'{_where(runner.iter + 1)}: in {_count(steps)} all gradients '
                f'were zero in the side path for {_listed(zero)}. Its output '
                'reaches no loss, the learning rate is zero, or the gradients '
                'are too small for fp16 '
                "(`optim_wrapper.loss_scale='dynamic'`)."
            )

    def _check_absent(self, runner: Runner) -> None:
        gradients = self._gradients
        absent, steps = gradients.absent(), _count(gradients.steps)
        if not self._waits:
            known = [n for n in absent if n not in gradients.declared]
            absent = [n for n in absent if n in gradients.declared]
            if known:
                runner.logger.warning(
                    f'Training guard: in {steps} no gradient has come to '
                    f'{_listed(known)}, so it does not learn. Freeze it by '
                    '`e3va_mm.FreezeHook`, or allow it: '
                    '`TrainingGuardHook(without_gradient=[...])`.'
                )
        if absent:
            gradients.remove()
            raise TrainingError(
                f'{_where(runner.iter + 1)}: in {steps} no gradient has come '
                f'to {_listed(absent)}. The loss does not depend on it: '
                'several processes would end with "Expected to have finished '
                'reduction". Freeze it by `e3va_mm.FreezeHook`, leave out '
                "what nothing reads (a backbone's `out_indices` that the neck "
                'ignores), or allow it: '
                '`TrainingGuardHook(without_gradient=[...])`; several '
                'processes need `find_unused_parameters=True` then.'
            )

    def _checkpoint_is_due(self, runner: Runner, batch_idx: int) -> bool:
        by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
        return any(
            not by_iter
            and self.end_of_epoch(runner.train_dataloader, batch_idx)
            if hook.by_epoch
            else self.every_n_train_iters(runner, hook.interval)
            or self.is_last_train_iter(runner)
            for hook in runner.hooks
            if isinstance(hook, (CheckpointHook, AdapterCheckpointHook))
        )

    def _broken(self) -> list[str]:
        """Names of the trained weights that are not finite."""
        weights = {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        if not weights:
            return []
        finite = torch.stack([w.isfinite().all() for w in weights.values()])
        good = zip(weights, finite.tolist(), strict=True)
        return [name for name, is_good in good if not is_good]

    def _not_finite(
        self, runner: Runner, batch: Any, outputs: Mapping | None, what: str
    ) -> str:
        terms = {
            name: f'{_number(value):.6g}'
            for name, value in (outputs or {}).items()
            if _is_scalar(value)
        }
        broken = self._broken()
        update = (
            'The update has been made, and the weights are not finite any '
            f'more: {_listed(broken)}.'
            if broken
            else 'The weights are still finite.'
        )
        pictures = dict.fromkeys(_image_paths(batch))
        return (
            f'{_where(runner.iter + 1)}: {what} is not finite.\n'
            f'  Loss terms: {", ".join(map(" ".join, terms.items()))}\n'
            f'  Pictures: {", ".join(pictures) or "the batch names none"}\n'
            f'{update} No checkpoint is written from here on. '
            f'{_last_checkpoint(runner)} Look at these pictures and their '
            'annotations; a lower learning rate and '
            '`optim_wrapper.clip_grad=dict(max_norm=...)` help where '
            'training diverges.'
        )


class _Gradients:
    """Which parameters have had a gradient in steps of optimizers.

    Looks right before a step, when gradients are averaged over processes,
    summed over accumulated iterations and rid of their loss scale. Steps that
    a loss scaler leaves out are none.

    Args:
        model (nn.Module): The model, without its wrapper.
        excused (set[nn.Parameter]): What is not looked at.
        optimizers (Sequence[Optimizer]): All that step.
    """

    def __init__(
        self,
        model: nn.Module,
        excused: set[nn.Parameter],
        optimizers: Sequence[Optimizer],
    ) -> None:
        self.watched = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter not in excused
        }
        own = {
            parameter
            for _, backbone in tuned_backbones(model)
            for parameter in backbone.declared()
        }
        self.declared = {n for n, p in self.watched.items() if p in own}
        self._absent = set(self.watched)
        self._zero = set(self.declared)
        self._steps = [0] * len(optimizers)
        self._handles = [
            optimizer.register_step_pre_hook(partial(self._look, i))
            for i, optimizer in enumerate(optimizers)
        ]
        if not optimizers:
            self.watched = {}

    @property
    def looks(self) -> bool:
        """Whether steps are still looked at."""
        return bool(self._handles)

    @property
    def steps(self) -> int:
        """How many steps every optimizer has made at least."""
        return min(self._steps, default=0)

    def absent(self) -> list[str]:
        """Names without a gradient, in the model's order."""
        return self._training(self._absent)

    def zero(self) -> list[str]:
        """Names of a side path whose gradients were zero all the time."""
        return self._training(self._zero - self._absent)

    def _training(self, names: set[str]) -> list[str]:
        """Those that still require a gradient."""
        return [
            name
            for name, parameter in self.watched.items()
            if name in names and parameter.requires_grad
        ]

    def remove(self) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable
    def _look(self, index: int, *_: Any) -> None:
        """Take down what has a gradient just before a step."""
        self._steps[index] += 1
        self._absent = {
            n for n in self._absent if self.watched[n].grad is None
        }
        names = [n for n in self.zero() if self.watched[n].grad is not None]
        if names:
            moved = [self.watched[n].grad.any() for n in names]
            moved = torch.stack(moved).tolist()
            self._zero -= {
                name for name, m in zip(names, moved, strict=True) if m
            }


def _excused(model: nn.Module, patterns: Sequence[str]) -> set[nn.Parameter]:
    """Parameters that patterns name, or modules that these name, have."""
    parts = parts_of(model)
    return {
        parameter
        for pattern in patterns
        for path in matching(pattern, parts, f'part of {_kind(model)}')
        for parameter in parameters_of(parts[path])
    }


def _below(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters and buffers that patterns name or enclose."""
    parts = {**parts_of(model), **dict(model.named_buffers())}
    chosen = [
        parts[path]
        for pattern in patterns
        for path in matching(pattern, parts, f'part of {_kind(model)}')
    ]
    tensors = {
        id(tensor)
        for part in chosen
        for tensor in (
            [*part.parameters(), *part.buffers()]
            if isinstance(part, nn.Module)
            else [part]
        )
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, tensor in named if id(tensor) in tensors}


def _waits(model: nn.Module) -> bool:
    """Whether processes wait for the gradients of all parameters."""
    return any(
        isinstance(module, DistributedDataParallel)
        and not getattr(module, 'find_unused_parameters', True)
        and not module.static_graph
        for module in model.modules()
    )


def _averaged(runner: Runner, model: nn.Module) -> list[str]:
    """Paths of what hooks of the frameworks write averages into."""
    writes = any(
        kind.__name__ == 'MeanTeacherHook'
        for hook in runner.hooks
        for kind in type(hook).__mro__
    )
    return ['teacher'] if writes and hasattr(model, 'teacher') else []


def _to_check(outputs: Mapping) -> Iterator[float]:
    """The loss, which all terms are in; else all that a step has given."""
    if 'loss' in outputs:
        yield _number(outputs['loss'])
    else:
        yield from map(_number, filter(_is_scalar, outputs.values()))


def _is_scalar(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() == 1
    return isinstance(value, (int, float))


def _number(value: Any) -> float:
    return value.item() if torch.is_tensor(value) else float(value)


def _image_paths(batch: Any) -> Iterator[str]:
    """Paths of the pictures in whatever form a batch has."""
    if isinstance(batch, (BaseDataElement, Mapping)):
        info = getattr(batch, 'metainfo', batch)
        found = info.get('img_path')
        if found is not None:
            yield from [found] if isinstance(found, str) else found
            return
        batch = [*batch.values()]
    if isinstance(batch, (list, tuple)):
        for each in batch:
            yield from _image_paths(each)


def _last_checkpoint(runner: Runner) -> str:
    note = Path(runner.work_dir, 'last_checkpoint')
    if not note.is_file():
        return 'There is no checkpoint to go on from.'
    return f'The last checkpoint is {note.read_text().strip()}.'


def _where(iteration: int) -> str:
    rank = f' (process {get_rank()})' if get_world_size() > 1 else ''
    return f'Iteration {iteration}{rank}'


def _count(steps: int) -> str:
    return f'{steps} step{"s" * (steps > 1)} of the optimizer'


def _kind(model: nn.Module) -> str:
    return type(model).__name__
