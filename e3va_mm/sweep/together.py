"""Several runs, each with a runner of its own, that one loop steps."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.registry import LOOPS
from mmengine.runner import Runner, set_random_seed

from e3va_mm.engine.hooks import ProgressBarHook
from e3va_mm.errors import DivergedError
from e3va_mm.frameworks.runners import (
    FollowingLoop,
    make_current,
    quiet_runner,
    set_train_loop,
)
from e3va_mm.preflight import DatasetCheckHook
from e3va_mm.sweep.draws import Draws
from e3va_mm.sweep.shared_step import Run, train_step, val_step
from e3va_mm.utils.unwrapping import unwrapped


class Together:
    """Trains several runs on one pass of their trunk.

    Each has its runner: model, optimizer, schedules, hooks, logger, work
    folder and random numbers. The framework's own loops of training and
    validation step all of them: what such a loop takes for its runner is this
    object, and what it tells that runner goes to all.

    Args:
        configs (Mapping[str, Config]): The configs by the name of the run,
            see :func:`~e3va_mm.sweep.check_together`. Each has a ``work_dir``
            and an ``experiment_name`` of its own.
        seed (int): Of the data: its order, its augmentation.
        on_step (Callable, optional): Called after each iteration with its
            number, that of all, and the losses by the name of the run.
        on_validation (Callable, optional): Called with the name of a run and
            its metrics.

    Attributes:
        ended (dict[str, str]): Runs that have diverged, and how.

    Raises:
        ConfigError: If the runs cannot share a pass.
    """

    def __init__(
        self,
        configs: Mapping[str, Config],
        seed: int,
        on_step: Callable[[int, int, dict[str, float]], None] | None = None,
        on_validation: Callable[[str, dict], None] | None = None,
    ) -> None:
        self.seed = seed
        self.on_step, self.on_validation = on_step, on_validation
        self.ended: dict[str, str] = {}
        self.val_loop = None
        self._waiting = dict(configs)
        self._runs: list[_Runner] = []

    def run(self) -> dict[str, str]:
        """Train them to their ends; those that have diverged, and how."""
        self._enter_next()
        return self.ended

    def _enter_next(self) -> None:
        """Have the next runner prepare its training, or begin with all.

        Each enters from within the loop of the one before: a runner prepares,
        calls its loop and cleans up in one method.
        """
        if not self._waiting:
            self._train()
            return
        name = next(iter(self._waiting))
        config = self._waiting.pop(name)
        runner = quiet_runner(config)
        # Who follows has the same data; bars would draw over each other.
        once = ProgressBarHook, *([DatasetCheckHook] if self._runs else [])
        runner.hooks[:] = [h for h in runner.hooks if not isinstance(h, once)]
        if not self._runs:
            self._first = runner
            self._loop = self._common_loop(config)
        set_train_loop(runner, _RunLoop(name, runner, self))
        runner.train()

    def _common_loop(self, config: Config) -> Any:
        options = dict(config.train_cfg)
        if 'type' not in options:
            by_epoch = options.pop('by_epoch')
            options['type'] = (
                f'{"Epoch" if by_epoch else "Iter"}BasedTrainLoop'
            )
        arguments = dict(runner=self, dataloader=config.train_dataloader)
        return LOOPS.build(options, default_args=arguments)

    def _train(self) -> None:
        first = self._first
        if first.val_loop is not None:
            arguments = dict(runner=self, evaluator=[])
            self.val_loop = LOOPS.build(
                dict(first.cfg.val_cfg, type=type(first.val_loop)),
                default_args=dict(
                    arguments, dataloader=first.val_loop.dataloader
                ),
            )
        # What draws from here on and is no run's: the data.
        set_random_seed(self.seed)
        try:
            self._loop.run()
        except _NoRunIsLeft:
            pass

    def _end(self, run: '_Runner', how: str | None = None) -> None:
        """Go on without a run."""
        self._runs.remove(run)
        if how is not None:
            self.ended[run.name] = how
            run.runner.logger.error(how)
        else:
            with run.scope():
                run.runner.call_hook('after_train')
        if not self._runs:
            raise _NoRunIsLeft

    # -- what a loop asks its runner for ------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == '_first':  # before there is one
            raise AttributeError(name)
        return getattr(self._first, name)

    @property
    def model(self) -> 'Together':
        """What a loop sets to a mode and steps."""
        return self

    def train(self) -> None:
        """Set all models to training."""
        for run in self._runs:
            run.runner.model.train()

    def eval(self) -> None:
        """Set all models to evaluation."""
        for run in self._runs:
            run.runner.model.eval()

    def train_step(self, data: Mapping, optim_wrapper: Any) -> list:
        """Train all on a batch."""
        outputs = train_step(self._runs, data)
        if self.on_step is not None:
            losses = {run.name: log['loss'].item() for run, log in outputs}
            self.on_step(self._loop.iter + 1, self._loop.max_iters, losses)
        return outputs

    def val_step(self, data: Mapping) -> list:
        """Have all predict for a batch."""
        return val_step(self._runs, data)

    def build_evaluator(self, evaluator: list) -> 'Together':
        """What stands for the evaluators of all."""
        return self

    def process(self, data_samples: list, data_batch: Mapping) -> None:
        """Give each evaluator what its run has predicted."""
        for run, predicted in data_samples:
            with run.scope():
                run.runner.val_evaluator.process(
                    data_samples=predicted, data_batch=data_batch
                )

    def evaluate(self, size: int) -> '_Metrics':
        """The metrics of each."""
        found = _Metrics()
        for run in self._runs:
            with run.scope():
                metrics = run.runner.val_evaluator.evaluate(size)
            found.append((run, metrics))
            if self.on_validation is not None:
                self.on_validation(run.name, metrics)
        return found

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call the hooks of all; one that has diverged leaves."""
        each = {
            key: dict(kwargs.pop(key))
            for key in ('outputs', 'metrics')
            if key in kwargs
        }
        for run in [*self._runs]:
            own = {key: values[run] for key, values in each.items()}
            how = None
            try:
                with run.scope():
                    run.runner.call_hook(fn_name, **kwargs, **own)
            except DivergedError as error:
                how = str(error)
            if fn_name == 'after_train_iter' and how is None:
                # Not all configs have the guard.
                loss = own['outputs']['loss'].item()
                if not math.isfinite(loss):
                    how = f'Iteration {self._loop.iter + 1}: loss is {loss}.'
            if how is not None or run.runner.train_loop.stop_training:
                self._end(run, how)


class _NoRunIsLeft(Exception):
    """All runs have ended before the loop."""


class _Metrics(list):
    """Pairs of runs and metrics; a loop may add its own to metrics."""

    def update(self, losses: Mapping) -> None:
        for _, metrics in self:
            metrics.update(losses)


class _Runner(Run):
    """A run with its runner."""

    def __init__(self, name: str, runner: Runner) -> None:
        self.runner = runner
        self._draws = Draws()
        super().__init__(
            name, unwrapped(runner.model), runner.optim_wrapper, self._scope
        )

    @contextmanager
    def _scope(self) -> Iterator[None]:
        make_current(self.runner)
        with self._draws.used():
            yield


class _RunLoop(FollowingLoop):
    """What a runner of several takes for its training loop."""

    def __init__(self, name: str, runner: Runner, together: Together) -> None:
        super().__init__(runner, together._loop)
        self._name, self._together = name, together

    def run(self) -> Any:
        """Join the others; returns when all have trained."""
        together, runner = self._together, self.runner
        run = _Runner(self._name, runner)
        if together._runs:
            run.share_trunk(together._runs[0])
        together._runs.append(run)
        together._enter_next()
        make_current(runner)
        return runner.model
