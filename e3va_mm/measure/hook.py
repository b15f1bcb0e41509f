import statistics
import time

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner

from e3va_mm.errors import ConfigError
from e3va_mm.measure import LiveBytes
from e3va_mm.registry import HOOKS
from e3va_mm.utils import count_parameters, is_whole
from e3va_mm.utils.wrappers import unwrapped

MIB = 2**20
PREFIX = 'measured_'


@HOOKS.register_module()
class MeasureHook(Hook):
    """Measures a running training as tools/measure.py measures a step.

    On the first rank, and without a change of any result:

    * what trains, and the accounted peak by category of **one** iteration,
      the first after ``at`` iterations and one update of the weights that
      itself ends with an update. It takes longer than others. On CUDA, what
      the allocator held stands beside it;
    * then the median and the spread of the seconds that ``timed`` iterations
      take, without the loading of data.

    Both are logged once, and stand once in the scalars of the visualizer, in
    the next record of ``LoggerHook``, under ``measured_...``. After that the
    hook costs nothing.

    Accounting counts tensors by storage. It sees nothing of buckets of DDP,
    and of compiled code (``compile`` in the config) what eager code would
    take: there it is left out.

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

    # After the logger: it sees which records were written.
    priority = 'VERY_LOW'

    def __init__(self, at: int = 3, timed: int = 50) -> None:
        if not (is_whole(at, 0) and is_whole(timed, 1)):
            raise ConfigError(
                'MeasureHook expects a whole number `at` of at least 0 and '
                f'`timed` of at least 1, but got at={at!r}, timed={timed!r}.'
            )
        self.at, self.timed = at, timed
        self.figures: dict = {}

    def before_train(self, runner: Runner) -> None:
        """Takes the place of the model's ``train_step`` for a while."""
        self.figures = {}
        self._pending: list[str] = []
        self._active = is_main_process()
        if not self._active:
            return
        model = runner.model
        self._own = vars(model).get('train_step')
        self._step = model.train_step
        self._first = runner.iter + max(self.at, _accumulation(runner))
        self._compiled = bool(runner.cfg.get('compile'))
        self._on_cuda = next(model.parameters()).is_cuda

        def train_step(*args, **kwargs):
            return self._measured(runner, args, kwargs)

        # Not the hooks before and after an iteration: those of others, which
        # save checkpoints or draw, run between them.
        model.train_step = train_step

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch=None,
        outputs=None,
    ) -> None:
        """Takes back the scalars that the logger has written."""
        if self._pending and self._was_logged(runner, batch_idx):
            self._retract(runner)

    def after_train(self, runner: Runner) -> None:
        """Says what could not be measured."""
        if self._active:
            if 'seconds' in self.figures:
                self._log_seconds(runner)
            elif 'trainable' not in self.figures:
                runner.logger.warning(
                    'MeasureHook has measured nothing: the training ended '
                    f'before iteration {self._first + 1}.'
                )
            self._end(runner)
        self._retract(runner)

    def _measured(self, runner: Runner, args: tuple, kwargs: dict):
        """Run one iteration; measure it if it is its turn."""
        now = runner.iter
        if 'trainable' not in self.figures:
            if now < self._first or (now + 1) % _accumulation(runner):
                return self._step(*args, **kwargs)
            self._count(runner)
            if not self._compiled:
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

    def _count(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        total, trainable = count_parameters(model)
        self.figures.update(total=total, trainable=trainable)
        text = f'Measured: {trainable:,} of {total:,} parameters train'
        if hasattr(model, 'backbone'):
            _, trainable = count_parameters(model.backbone)
            text += f', {trainable:,} of them in the backbone'
        runner.logger.info(text)
        self._publish(runner, trainable=self.figures['trainable'])

    def _account(self, runner: Runner, args: tuple, kwargs: dict):
        """Run one iteration and count what is alive in it."""
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        model = unwrapped(runner.model)
        with LiveBytes(model, runner.optim_wrapper) as count:
            result = self._step(*args, **kwargs)
        memory = dict(peak=count.peak, **count.at_peak)
        if self._on_cuda:
            memory.update(
                allocated=torch.cuda.max_memory_allocated(),
                reserved=torch.cuda.max_memory_reserved(),
            )
        self.figures.update(memory)
        texts = [f'{key} {size / MIB:,.1f}' for key, size in memory.items()]
        runner.logger.info(
            f'Measured in iteration {runner.iter + 1}, MiB, accounted: '
            f'{", ".join(texts)}'
        )
        sizes = {f'{key}_mib': size / MIB for key, size in memory.items()}
        self._publish(runner, **sizes)
        return result

    def _log_seconds(self, runner: Runner) -> None:
        seconds = self.figures['seconds']
        spread = dict(
            seconds=statistics.median(seconds),
            seconds_min=min(seconds),
            seconds_max=max(seconds),
        )
        runner.logger.info(
            f'Measured over {len(seconds)} iterations, without data loading: '
            '{seconds:.4f} s an iteration, {seconds_min:.4f} to '
            '{seconds_max:.4f}'.format(**spread)
        )
        self._publish(runner, **spread)

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

    def _publish(self, runner: Runner, **scalars: float) -> None:
        for name, value in scalars.items():
            key = f'train/{PREFIX}{name}'
            runner.message_hub.update_scalar(key, value)
            self._pending.append(key)

    def _retract(self, runner: Runner) -> None:
        """Scalars stand in each record of the logger until they go."""
        for key in self._pending:
            runner.message_hub.log_scalars.pop(key, None)
        self._pending.clear()

    def _was_logged(self, runner: Runner, batch_idx: int) -> bool:
        """Whether ``LoggerHook`` has written a record in this iteration."""
        loader = runner.train_dataloader
        return any(
            self.every_n_inner_iters(batch_idx, hook.interval)
            or (
                self.end_of_epoch(loader, batch_idx)
                and (not hook.ignore_last or len(loader) <= hook.interval)
            )
            for hook in runner.hooks
            if isinstance(hook, LoggerHook)
        )


def _accumulation(runner: Runner) -> int:
    """Iterations to one update of the weights."""
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)
