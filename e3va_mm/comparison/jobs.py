"""Trainings and tests in processes of their own, some beside each other."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

from mmengine.config import Config

from e3va_mm.comparison.methods import (
    is_side_path,
    method_config,
    run_config,
)
from e3va_mm.comparison.records import AUTO, Records, Run
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.sweep import check_together, scalars
from e3va_mm.tuners.e3va.presets import resolve_preset
from e3va_mm.utils.configs import content_key

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 15
# Trains the runs of several folders on one pass of the trunk.
TOGETHER = ('e3va_mm.commands.train_folders',)
COCO = ('coco/bbox_mAP', 'coco/segm_mAP')
# In a record beside the figures of an evaluation.
TIMES = ('step', 'time', 'data_time')
# The end of a training of which a loss or a weight is not finite.
DIVERGED = re.compile(r'^error: .* is not finite', re.MULTILINE)


class Jobs:
    """Trains and tests the runs of a comparison.

    Args:
        config (Config): The config that is compared on.
        records (Records): What is known; figures are added to it.
        work_dir (Path): Each run has a folder in it.
        count (int): How many run beside each other.
        lock (IO): A file that is open as long as a job runs.
        on_end (Callable): Called with each run that has ended and its
            figures.

    Side paths of one seed train in one process, on one pass of the trunk.

    Raises:
        ConfigError: If a method is another one than ``records`` knows.
    """

    def __init__(
        self,
        config: Config,
        records: Records,
        work_dir: Path,
        count: int,
        lock: IO,
        on_end: Callable[[Run, dict], None],
    ) -> None:
        self.config, self.records = config, records
        self.work_dir, self.count = work_dir.resolve(), count
        self.lock, self.on_end = lock, on_end
        self.processes: set[subprocess.Popen] = set()
        self.failure: BaseException | None = None
        self.spent_before = records.cpu_seconds - _cpu_seconds()
        for method in records.methods:
            for run in (*records.searches(method), *records.chosen(method)):
                known = records.runs.get(run.name, {}).get('config')
                if known and known != content_key(self.config_of(run)):
                    raise ConfigError(
                        f'{records.path} holds figures of another {method} '
                        f'than there is now: {run.name}. Name another folder '
                        'with --work-dir.'
                    )

    def config_of(self, run: Run) -> Config:
        """The config of a run."""
        config = method_config(self.config, run.method)
        return run_config(config, run.lr, run.seed)

    def train(self) -> None:
        """Train all that is left."""
        # The rates first: the other seeds follow from their figures.
        while runs := self.records.to_train():
            self._run_all(self._train, self._groups(runs))
        for method in self.records.methods:
            chosen = self.records.chosen(method)
            for run in self.records.searches(method):
                if run not in chosen:
                    self._drop_checkpoints(run)

    def test(self) -> None:
        """Test all that is left."""
        self._run_all(self._test, [[run] for run in self.records.to_test()])

    def _groups(self, runs: Iterable[Run]) -> list[list[Run]]:
        """Runs that train in one process: side paths of one trunk and seed."""
        found: dict[Any, dict[Run, Config]] = defaultdict(dict)
        for run in runs:
            key, config = run, self.config_of(run)
            if is_side_path(run.method):
                _, options = resolve_preset(config.model.backbone.tuner)
                if not options.drop_path:
                    key = run.seed, options
            found[key][run] = config
        groups = []
        for group in found.values():
            try:
                check_together({run.name: c for run, c in group.items()})
            except ConfigError:
                groups += [[run] for run in group]
            else:
                groups.append([*group])
        return groups

    def _run_all(
        self,
        work: Callable[..., list[dict]],
        groups: Iterable[Sequence[Run]],
    ) -> None:
        """Do some work for all runs, and record the figures."""

        def attempt(runs: Sequence[Run]) -> list[dict]:
            # After a failure nothing begins, and what it ends tells of it.
            if self.failure is None:
                try:
                    return work(*runs)
                except BaseException as error:
                    self.failure = self.failure or error
            raise self.failure

        with ThreadPoolExecutor(self.count) as pool:
            futures = {pool.submit(attempt, runs): runs for runs in groups}
            try:
                for future in as_completed(futures):
                    self.records.cpu_seconds = (
                        self.spent_before + _cpu_seconds()
                    )
                    for run, figures in zip(
                        futures[future], future.result(), strict=True
                    ):
                        self.records.update(run, **figures)
                        self.on_end(run, figures)
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                self.failure = self.failure or error
                for process in [*self.processes]:
                    process.terminate()
                raise

    def _train(self, *runs: Run) -> list[dict]:
        """Train or resume runs, in one process; their figures."""
        left = list(runs)
        diverged: set[Run] = set()
        for _ in range(2):
            for run in left:
                self._prepare(run)
            diverged |= self._train_once(left)
            left = [
                run
                for run in left
                if run not in diverged and self._validation(run) is None
            ]
            if not left:
                break
            # A kill between checkpoint and validation: once more, whole.
            for run in left:
                shutil.rmtree(self.work_dir / run.name)
        return [self._trained(run, run in diverged) for run in runs]

    def _prepare(self, run: Run) -> None:
        """Write the config of a run into its folder."""
        folder, config = self.work_dir / run.name, self.config_of(run)
        path = folder / 'config.py'
        if path.exists() and path.read_text() != config.pretty_text:
            shutil.rmtree(folder)  # of other settings
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(config.pretty_text)

    def _train_once(self, runs: Sequence[Run]) -> set[Run]:
        """Train runs from where they are; those that have diverged."""
        first, *others = runs
        folders = [self.work_dir / run.name for run in runs]
        if others:
            self._execute(first, 'train', folders, TOGETHER)
            return {
                run
                for run, folder in zip(runs, folders, strict=True)
                if (folder / 'diverged').exists()
            }
        path, *_ = folders
        arguments = (path / 'config.py', '--work-dir', path, '--resume')
        log = self._execute(first, 'train', arguments)
        return set(runs) if log is None else set()

    def _trained(self, run: Run, diverged: bool) -> dict:
        """The figures of a run that has trained."""
        key = content_key(self.config_of(run))
        if diverged:
            return dict(diverged=True, config=key)
        found = self._validation(run)
        metric = self.records.metric
        if not found or metric not in (*found, AUTO):
            names = ', '.join(found or ['nothing'])
            raise ConfigError(
                f'Expected {metric} in the validation of {run.name}, '
                f'but found {names}. Name one with --metric, or add '
                '`LocalVisBackend` to `visualizer` of the config.'
            )
        return dict(validation=found, config=key)

    def _test(self, run: Run) -> list[dict]:
        """Test a run, trained again if its checkpoint is gone; its figures."""
        folder = self.work_dir / run.name
        if not (folder / 'last_checkpoint').exists():
            self._train(run)
        # The file names a path of the day, and folders are moved.
        name = Path((folder / 'last_checkpoint').read_text().strip()).name
        out = folder / 'test'
        arguments = (folder / 'config.py', folder / name, '--work-dir', out)
        self._execute(run, 'test', arguments)
        path = sorted(out.glob('*/*.json'))[-1]
        found = json.loads(path.read_text().splitlines()[-1])
        self._drop_checkpoints(run)
        return [dict(test=self._figures(found))]

    def _drop_checkpoints(self, run: Run) -> None:
        folder = self.work_dir / run.name
        for path in (*folder.glob('*.pth'), folder / 'last_checkpoint'):
            path.unlink(missing_ok=True)

    def _execute(
        self,
        run: Run,
        command: str,
        arguments: Iterable[str | Path],
        module: Sequence[str] = (),
    ) -> Path | None:
        """Run a command to its end; its log, or None if it has diverged.

        Args:
            run (Run): In whose folder the log is.
            command (str): The name of the log, and of the command of
                ``e3va`` without a module.
            arguments (Iterable[str | Path]): Those of the command.
            module (Sequence[str]): What Python runs instead.
        """
        log = self.work_dir / run.name / f'{command}.log'
        cores = len(os.sched_getaffinity(0))
        threads = str(max(1, cores // self.count))
        paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
        environment = dict(
            os.environ,
            OMP_NUM_THREADS=threads,
            PYTHONPATH=os.pathsep.join(filter(None, paths)),
        )
        what = module or ('e3va_mm.cli', command)
        with log.open('wb') as out:
            process = subprocess.Popen(
                [sys.executable, '-m', *what, *map(str, arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock.fileno()],
                env=environment,
            )
        self.processes.add(process)
        if self.failure is not None:
            process.terminate()
        code = process.wait()
        self.processes.discard(process)
        if code == 0:
            return log
        text = log.read_text(errors='replace')
        if code > 0 and DIVERGED.search(text):
            return None
        lines = '\n'.join(text.splitlines()[-LOG_LINES:])
        raise E3VAError(
            f'{run.name} has failed ({code}):\n{lines}\nThe whole log: {log}'
        )

    def _validation(self, run: Run) -> dict[str, float] | None:
        """The last figures on validation that a run has written."""
        records = scalars(self.work_dir / run.name)
        found = [record for record in records if 'loss' not in record]
        return self._figures(found[-1]) if found else None

    def _figures(self, record: dict) -> dict[str, float]:
        """Metrics of a record; CocoMetric has none if nothing is detected."""
        found = {
            key: value
            for key, value in record.items()
            if isinstance(value, (int, float)) and key not in TIMES
        }
        metric = self.records.metric
        if not found and metric.startswith('coco/'):
            return dict.fromkeys({metric, *COCO}, 0.0)
        return found


def _cpu_seconds() -> float:
    """What all processes have computed that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
