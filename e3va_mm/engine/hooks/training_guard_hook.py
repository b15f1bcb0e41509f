import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.engine.hooks.adapter_checkpoint_hook import (
    AdapterCheckpointHook,
)
from e3va_mm.engine.runner_optimizers import optimizers_of
from e3va_mm.errors import DivergedError, TrainingError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.batches import images_of
from e3va_mm.utils.listing import listed
from e3va_mm.utils.module_paths import check_patterns, parameters_of, select
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.unwrapping import unwrapped

# Up projections start at zero: what lies before one may have no gradient at
# first.
STEPS = 3
_listed = partial(listed, shown=10)


@HOOKS.register_module()
class TrainingGuardHook(Hook):
    """Ends a run that cannot come to anything, and says why.

    It does so when

    * the loss is NaN or infinite: in that iteration; or a trained weight, when
      a checkpoint is about to be written;
    * a parameter that a backbone declares to train has had no gradient in the
      first three steps of the optimizer;
    * any parameter that trains has had none in the first step, and
      DistributedDataParallel without ``find_unused_parameters`` waits for it.
      Elsewhere it is a warning, after three steps.

    In several processes each looks for itself; the launcher stops the others.

    Args:
        interval (Any): Accepted from older configs, without effect.
        without_gradient (Sequence[str]): Paths of parameters, or of modules,
            that may be without a gradient, ``*`` standing for any one part.
            Defaults to none.
        may_change (Any): Accepted from older configs, without effect.

    Raises:
        ConfigError: If a path matches nothing.
        TrainingError: As above.
    """

    # Before EMAHook takes a weight into its average and a file is written.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        interval: Any = None,
        without_gradient: Sequence[str] = (),
        may_change: Any = None,
    ) -> None:
        check_patterns(
            without_gradient, 'TrainingGuardHook: `without_gradient`'
        )
        self.without_gradient = without_gradient
        if interval is not None or may_change is not None:
            print_log(
                'TrainingGuardHook: `interval` and `may_change` have no '
                'effect; frozen tensors are no longer compared.',
                'current',
            )

    def before_train(self, runner: Runner) -> None:
        """Find what the options name."""
        self._model = unwrapped(runner.model)
        excused = select(self._model, self.without_gradient)
        self._excused = parameters_of(*excused.values())
        self._handles = None

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Watch the gradients of what trains, from the first step on.

        Only now is the model in train mode, in which backbones freeze layers.
        """
        if self._handles is None:
            self._absent = {
                name: parameter
                for name, parameter in self._trained().items()
                if parameter not in self._excused
            }
            self._calls = 0
            self._handles = [
                optimizer.register_step_pre_hook(self._look)
                for optimizer in optimizers_of(runner)
            ]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Look at the loss, and at gradients at first."""
        terms = {
            name: value.item() if torch.is_tensor(value) else value
            for name, value in (outputs or {}).items()
            if isinstance(value, (int, float))
            or (torch.is_tensor(value) and value.numel() == 1)
        }
        losses = [terms['loss']] if 'loss' in terms else terms.values()
        if not all(map(math.isfinite, losses)):
            self._end(runner, 'the loss', terms, data_batch)
        # Not at the save: mmengine's hook has removed the older file by then.
        if self._save_is_due(runner, batch_idx) and self._broken():
            self._end(runner, 'what trains', terms, data_batch)
        if self._handles:
            self._check_gradients(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at what a validation has found to be the best, too."""
        if hasattr(self, '_model') and self._broken():
            self._end(runner, 'what trains', {}, None)

    def _save_is_due(self, runner: Runner, batch_idx: int) -> bool:
        saving = [
            # An AdapterCheckpointHook has its options in one place.
            getattr(hook, 'options', hook)
            for hook in runner.hooks
            if isinstance(hook, (CheckpointHook, AdapterCheckpointHook))
        ]
        return any(
            self.end_of_epoch(runner.train_dataloader, batch_idx)
            if each.by_epoch
            else self.every_n_train_iters(runner, each.interval)
            or self.is_last_train_iter(runner)
            for each in saving
        )

    def _broken(self) -> list[str]:
        trained = self._trained().items()
        return [n for n, p in trained if not p.isfinite().all()]

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self._model.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    @torch.compiler.disable
    def _look(self, *_: Any) -> None:
        """Take down what has no gradient, just before a step."""
        self._calls += 1
        absent = self._absent.items()
        self._absent = {name: p for name, p in absent if p.grad is None}

    def _check_gradients(self, runner: Runner) -> None:
        ddp_waits = any(
            isinstance(module, DistributedDataParallel)
            and not module.find_unused_parameters
            and not module.static_graph
            for module in runner.model.modules()
        )
        steps = self._calls // len(self._handles)
        if steps < (1 if ddp_waits else STEPS):
            return
        while self._handles:
            self._handles.pop().remove()
        backbones = [each for _, each in tuned_backbones(self._model)]
        declared = {p for each in backbones for p in each.declared()}
        # Hooks may have frozen some since.
        absent = {n: p for n, p in self._absent.items() if p.requires_grad}
        fatal = [n for n, p in absent.items() if ddp_waits or p in declared]
        text = (
            f'{_where(runner)}: in {steps} step{"s" * (steps > 1)} of the '
            f'optimizer no gradient has come to {_listed(fatal or [*absent])}.'
            ' The loss does not depend on it. Freeze it by '
            '`e3va_mm.FreezeHook`, leave out what nothing reads (a '
            "backbone's `out_indices` that the neck ignores), or allow it: "
            '`TrainingGuardHook(without_gradient=[...])`; several processes '
            'need `find_unused_parameters=True` then.'
        )
        if fatal:
            raise TrainingError(text)
        if absent:
            runner.logger.warning(text)

    def _end(
        self, runner: Runner, what: str, terms: Mapping, batch: Any
    ) -> None:
        images = dict.fromkeys(path for path, _ in images_of(batch))
        listing = ', '.join(f'{k} {v:.6g}' for k, v in terms.items())
        note = Path(runner.work_dir, 'last_checkpoint')
        last = note.read_text().strip() if note.is_file() else 'none'
        raise DivergedError(
            f'{_where(runner)}: {what} is not finite.\n'
            f'  Loss terms: {listing or "finite"}\n'
            f'  Images: {", ".join(images) or "the batch names none"}\n'
            f'  Weights that are not finite: {_listed(self._broken())}\n'
            f'  Last checkpoint: {last}\n'
            'No checkpoint is written from here on. Look at these images and '
            'their annotations; a lower learning rate and '
            '`optim_wrapper.clip_grad=dict(max_norm=...)` help where training '
            'diverges.'
        )


def _where(runner: Runner) -> str:
    rank = f' (process {get_rank()})' if get_world_size() > 1 else ''
    return f'Iteration {runner.iter + 1}{rank}'
