import statistics
import time
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from e3va_mm.engine.runner_optimizers import iterations_per_update
from e3va_mm.errors import ConfigError
from e3va_mm.measure.live_bytes import LiveBytes
from e3va_mm.registry import HOOKS
from e3va_mm.utils import count_parameters, is_whole
from e3va_mm.utils.sizes import MIB
from e3va_mm.utils.unwrapping import unwrapped


@HOOKS.register_module()
class MeasureHook(Hook):
    """Measures a running training as ``e3va measure`` measures a step.

    On the first rank, and without a change of any result:

    * what trains, and the accounted peak by category of **one** iteration,
      the first after ``at`` iterations and one update of the weights that
      itself ends with an update. It takes longer than others. On CUDA, what
      the allocator held stands beside it;
    * then the median and the spread of the seconds that ``timed`` iterations
      take, without the loading of data.

    Both are logged once, and go to the scalars of the visualizer once, under
    ``measured_...``. After that the hook costs nothing.

    Accounting counts tensors by storage. It sees nothing of buckets of DDP.
    Compiled code (``compile`` in the config) is timed alone.

    Args:
        at (int): Iterations to let pass first. Defaults to 3.
        timed (int): Iterations to time. Defaults to 50.

    Attributes:
        figures (dict): What was measured so far: numbers of parameters
            ``trainable`` and ``total``, bytes ``peak``, ``weights``,
            ``gradients``, ``optimizer``, ``kept``, ``temporaries``, on CUDA
            ``allocated`` and ``reserved``; ``seconds`` of each iteration.

    Raises:
        ConfigError: If ``at`` is negative or ``timed`` not above zero, or
            either no whole number.
    """

    priority = 'VERY_LOW'

    def __init__(self, at: int = 3, timed: int = 50) -> None:
        if not (is_whole(at, 0) and is_whole(timed, 1)):
            raise ConfigError(
                'MeasureHook expects a whole number `at` of at least 0 and '
                f'`timed` of at least 1, but got at={at!r}, timed={timed!r}.'
            )
        self.at, self.timed = at, timed
        self.figures: dict[str, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Take the place of the model's ``train_step`` for a while."""
        self.figures = {}
        self._active = is_main_process()
        if not self._active:
            return
        model = runner.model
        self._own = vars(model).get('train_step')
        self._step = model.train_step
        self._first = runner.iter + max(self.at, iterations_per_update(runner))
        self._on_cuda = next(model.parameters()).is_cuda
        # Not the hooks before and after an iteration: those of others, which
        # save checkpoints or draw, run between them.
        model.train_step = lambda *a, **k: self._measured(runner, a, k)

    def after_train(self, runner: Runner) -> None:
        """Say what could not be measured."""
        if self._active:
            if 'seconds' in self.figures:
                self._log_seconds(runner)
            elif 'trainable' not in self.figures:
                runner.logger.warning(
                    'MeasureHook has measured nothing: the training ended '
                    f'before iteration {self._first + 1}.'
                )
            self._end(runner)

    def _measured(self, runner: Runner, args: tuple, kwargs: dict) -> Any:
        """Run one iteration; measure it if it is its turn."""
        if 'trainable' not in self.figures:
            updates = (runner.iter + 1) % iterations_per_update(runner) == 0
            if runner.iter < self._first or not updates:
                return self._step(*args, **kwargs)
            total, trainable = count_parameters(unwrapped(runner.model))
            self.figures.update(total=total, trainable=trainable)
            runner.logger.info(
                f'Measured: {trainable:,} of {total:,} parameters train'
            )
            if not runner.cfg.get('compile'):
                return self._account(runner, args, kwargs)
        self._synchronize()
        start = time.perf_counter()
        result = self._step(*args, **kwargs)
        self._synchronize()
        seconds = self.figures.setdefault('seconds', [])
        seconds.append(time.perf_counter() - start)
        if len(seconds) == self.timed:
            self._log_seconds(runner)
            self._end(runner)
        return result

    def _account(self, runner: Runner, args: tuple, kwargs: dict) -> Any:
        """Run one iteration and count what is alive in it."""
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        model = unwrapped(runner.model)
        with LiveBytes(model, runner.optim_wrapper) as count:
            result = self._step(*args, **kwargs)
        memory = dict(peak=count.peak, **count.at_peak)
        if self._on_cuda:
            memory['allocated'] = torch.cuda.max_memory_allocated()
            memory['reserved'] = torch.cuda.max_memory_reserved()
        self.figures.update(memory)
        texts = [f'{key} {size / MIB:,.1f}' for key, size in memory.items()]
        runner.logger.info(
            f'Measured in iteration {runner.iter + 1}, MiB, accounted: '
            f'{", ".join(texts)}'
        )
        sizes = {f'{key}_mib': size / MIB for key, size in memory.items()}
        self._publish(runner, trainable=self.figures['trainable'], **sizes)
        return result

    def _log_seconds(self, runner: Runner) -> None:
        seconds = self.figures['seconds']
        median, least, most = (
            f(seconds) for f in (statistics.median, min, max)
        )
        runner.logger.info(
            f'Measured over {len(seconds)} iterations, without data loading: '
            f'{median:.4f} s an iteration, {least:.4f} to {most:.4f}'
        )
        self._publish(
            runner, seconds=median, seconds_min=least, seconds_max=most
        )

    def _publish(self, runner: Runner, **scalars: float) -> None:
        runner.visualizer.add_scalars(
            {f'measured_{name}': value for name, value in scalars.items()},
            step=runner.iter + 1,
        )

    def _end(self, runner: Runner) -> None:
        """Give the model its own ``train_step`` back."""
        self._active = False
        if self._own is None:
            del runner.model.train_step
        else:
            runner.model.train_step = self._own

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
