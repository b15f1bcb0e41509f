import sys
import time
import weakref
from collections.abc import Callable
from typing import TextIO

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from e3va_mm.errors import ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils import is_number

COLUMNS = (
    *('training', BarColumn(), MofNCompleteColumn()),
    *('loss {task.fields[loss]}', TimeElapsedColumn()),
    *('left', TimeRemainingColumn()),
)


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows one bar over the whole training, with the time left.

    The bar stands below the log lines of the first rank when standard output,
    or else standard error, is a terminal; elsewhere the hook is silent. It
    counts iterations in all loops, and a resumed training starts where it
    stopped.

    Args:
        interval (float): Least time between two redraws, in seconds.
            Defaults to 0.5.

    Raises:
        ConfigError: If ``interval`` is negative or no number.
    """

    priority = 'LOW'

    def __init__(self, interval: float = 0.5) -> None:
        if not (is_number(interval) and interval >= 0):
            raise ConfigError(
                'ProgressBarHook: `interval` should be a number of seconds '
                f'from 0 on, but got {interval!r}.'
            )
        self.interval = interval
        self._progress: Progress | None = None
        # Gives the terminal back; more calls do nothing.
        self.stop: Callable[[], None] = lambda: None

    def before_train(self, runner: Runner) -> None:
        """Draw the bar, if there is a terminal to draw it on."""
        streams = [s for s in (sys.stdout, sys.stderr) if s and s.isatty()]
        if not streams or not is_main_process():
            return
        stream = streams[0]
        console = Console(file=stream, soft_wrap=True)
        # No refresh thread: data workers are forked while the bar is alive,
        # and would inherit its locks in any state.
        self._progress = Progress(
            *COLUMNS,
            console=console,
            auto_refresh=False,
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
            speed_estimate_period=300,
        )
        self._task = self._progress.add_task(
            'training', total=runner.max_iters, completed=runner.iter, loss='-'
        )
        # The logger's handler holds the terminal itself.
        handlers = [
            handler
            for handler in runner.logger.handlers
            if getattr(handler, 'stream', None) is stream
        ]
        for handler in handlers:
            handler.setStream(FileProxy(console, stream))
        self._progress.start()
        self._drawn = time.monotonic()
        # Hooks hear nothing of exceptions, which would leave the terminal
        # without its cursor.
        self.stop = weakref.finalize(
            self, _stop, self._progress, handlers, stream
        )

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Move the bar when ``interval`` has passed."""
        done, now = runner.iter + 1, time.monotonic()
        if self._progress is None or (
            done < runner.max_iters and now - self._drawn < self.interval
        ):
            return
        self._drawn = now
        loss = runner.message_hub.log_scalars.get('train/loss')
        self._progress.update(
            self._task,
            completed=done,
            loss='-' if loss is None else f'{loss.current():.4f}',
            refresh=True,
        )

    def after_train(self, runner: Runner) -> None:
        """Take the bar down; its last state stays on the terminal."""
        self.stop()


def _stop(progress: Progress, handlers: list, stream: TextIO) -> None:
    progress.stop()
    for handler in handlers:
        handler.setStream(stream)
