"""Train, test and measure every tuning method on one config, alike.

    python tools/compare.py CONFIG --methods all --seeds 3

Each method trains by the config's schedule with three learning rates; the one
that is best on validation trains with the other seeds. When all are trained,
their last checkpoints are tested, once. Memory and time are measured beside
each other in the same run. Interrupted, the same command goes on: WORK_DIR
holds comparison.json (all figures), comparison.md (the table) and two plots.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('PYTHONWARNINGS', 'ignore')

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import e3va_mm.checkpoint  # noqa: F401  checkpoints run no code
from e3va_mm.comparison import (
    METHODS,
    SIDE_PATHS,
    Records,
    Run,
    draw,
    markdown,
    method_config,
    run_config,
)
from e3va_mm.comparison.report import COSTS, HEADINGS
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.utils.files import write_whole
from e3va_mm.weights import without_trunks

ROOT = Path(__file__).resolve().parents[1]
LOG_LINES = 15
# Time left is that of all trainings up to now, in seconds.
DAY = 86400
COCO = ('coco/bbox_mAP', 'coco/segm_mAP')
# In a record beside the figures of an evaluation.
TIMES = ('step', 'time', 'data_time')
# How a training ends of which a loss or a weight is not finite.
DIVERGED = re.compile(r'^error: .* is not finite', re.MULTILINE)
# What an evaluator is known by.
METRICS = {'CocoMetric': 'coco/bbox_mAP', 'IoUMetric': 'mIoU'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument(
        '--methods',
        default='all',
        metavar='A,B',
        help=f'all, or some of {", ".join(every_method())}',
    )
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument(
        '--lrs',
        type=float,
        nargs='+',
        default=[1e-3, 2e-3, 4e-3],
        help='learning rates to choose from, the same for all',
    )
    parser.add_argument(
        '--trim',
        default='',
        metavar='A,B',
        help='of these methods, far off the others, two seeds alone',
    )
    parser.add_argument(
        '--metric',
        help='what chooses; default: coco/bbox_mAP or mIoU, by the evaluator',
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='trainings beside each other'
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='default: work_dirs/compare/ and the name of the config',
    )
    parser.add_argument(
        '--val-only', action='store_true', help='leave the test split alone'
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        '--measure-only', action='store_true', help='train nothing'
    )
    only.add_argument(
        '--no-measure', action='store_true', help='no memory and time'
    )
    parser.add_argument(
        '--device',
        default='cpu',
        help='of the measurement: cpu, the default, or cuda',
    )
    args = parser.parse_args(argv)
    if args.work_dir is None:
        args.work_dir = ROOT / 'work_dirs/compare' / Path(args.config).stem
    return args


def every_method() -> tuple[str, ...]:
    """What can be compared."""
    return (*METHODS, *SIDE_PATHS)


def names(text: str, option: str) -> list[str]:
    """Methods of a list with commas."""
    known = every_method()
    found = [*known] if text == 'all' else [n for n in text.split(',') if n]
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ConfigError(
            f'{option} should be all or some of {", ".join(known)}, but got '
            f'{unknown[0]!r}.'
        )
    return found


def metric_of(config: Config) -> str:
    """The metric that the config's evaluator is known by."""
    found = config.get('val_evaluator') or []
    evaluators = found if isinstance(found, Sequence) else [found]
    kinds = [
        getattr(kind, '__name__', str(kind)).split('.')[-1]
        for kind in (evaluator['type'] for evaluator in evaluators)
    ]
    for kind, metric in METRICS.items():
        if kind in kinds:
            return metric
    raise ConfigError(
        f'--metric should name what {", ".join(kinds) or "the evaluator"} '
        'gives, as the log of '
        'an evaluation has it.'
    )


def records_of(args: argparse.Namespace, config: Config) -> Records:
    """The records that the command line asks for."""
    for name in ('seeds', 'jobs'):
        if getattr(args, name) < 1:
            raise ConfigError(
                f'--{name} should be at least 1, but got '
                f'{getattr(args, name)}.'
            )
    methods = names(args.methods, '--methods')
    if not methods:
        raise ConfigError('--methods names none.')
    trimmed = names(args.trim, '--trim')
    for name in trimmed:
        if name not in methods:
            raise ConfigError(
                f'--trim names {name}, which is not compared. --methods are '
                f'{", ".join(methods)}.'
            )
    seeds = {
        method: min(2, args.seeds) if method in trimmed else args.seeds
        for method in methods
    }
    settings = dict(
        config=Path(args.config).name,
        content=digest(config),
        metric=args.metric or metric_of(config),
        lrs=sorted(args.lrs),
        torch=torch.__version__,
    )
    return Records(args.work_dir, settings, methods, args.lrs, seeds)


def locked(work_dir: Path) -> IO:
    """A file that one comparison, and what it has started, can hold."""
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = (work_dir / '.lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise E3VAError(
            f'In {work_dir} another comparison is running, or a training that '
            'one has left behind. Wait for it or end it, or name another '
            'folder with --work-dir.'
        ) from None
    return lock


def digest(config: Config) -> str:
    """What tells one config from another."""
    content = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def cpu_seconds() -> float:
    """What all processes have computed that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Job:
    """A training or a test in a process of its own.

    Args:
        run (Run): What is trained or tested.
        folder (Path): The run's.
        command (Sequence[str]): A tool and its arguments.
        threads (int): Threads of the process.
        lock (IO): Of the work directory; held as long as the process lives.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        command: Sequence[str],
        threads: int,
        lock: IO,
    ) -> None:
        self.run, self.folder = run, folder
        self.log = folder / f'{Path(command[0]).stem}.log'
        self.diverged = False
        self.start = time.monotonic()
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
            )

    def done(self) -> bool:
        """Whether it has ended, well or ``diverged``.

        Raises:
            E3VAError: If it has failed.
        """
        code = self.process.poll()
        if code:
            text = self.log.read_text(errors='replace')
            lines = text.splitlines()
            if code > 0 and DIVERGED.search(text):
                self.diverged = True
                return True
            raise E3VAError(
                f'{self.run.name} has failed ({code}):\n'
                + '\n'.join(lines[-LOG_LINES:])
                + f'\nAll of it: {self.log}'
            )
        return code == 0

    @property
    def minutes(self) -> float:
        """Minutes since it began."""
        return (time.monotonic() - self.start) / 60


class Comparison:
    """Runs what is left.

    Args:
        args (argparse.Namespace): The command line.
        config (Config): The config that is compared on.
        records (Records): What is known.
        lock (IO): Of the work directory.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: Config,
        records: Records,
        lock: IO,
    ) -> None:
        self.args, self.config, self.records = args, config, records
        cores = len(os.sched_getaffinity(0))
        self.threads = max(1, cores // args.jobs)
        self.unvalidated: set[Run] = set()
        self.spent_before = records.cpu_seconds - cpu_seconds()
        self.lock = lock

    def folder(self, run: Run) -> Path:
        """Where a run is trained."""
        return self.args.work_dir.resolve() / run.name

    def config_file(self, run: Run) -> Path:
        """The config of a run, written."""
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / 'config.py'
        text = self.config_of(run).pretty_text
        if path.exists() and path.read_text() != text:
            # Of other settings: not to go on with.
            shutil.rmtree(folder)
            folder.mkdir()
        if not path.exists():
            write_whole(path, text.encode())
        return path

    def config_of(self, run: Run) -> Config:
        """The config of a run."""
        config = method_config(self.config, run.method)
        return run_config(config, run.lr, run.seed)

    def check_runs(self) -> None:
        """Check that what is known is of the methods as they are now.

        Raises:
            ConfigError: If a method has changed.
        """
        for method in self.records.methods:
            for run in self.records.runs_of(method):
                known = self.records.runs.get(run.name, {}).get('config')
                if known and known != digest(self.config_of(run)):
                    raise ConfigError(
                        f'{self.records.path} holds figures of another '
                        f'{method} than there is now: {run.name}. Name '
                        'another folder with --work-dir.'
                    )

    def train(self, run: Run) -> Job:
        """Begin a training, or go on with it."""
        config, folder = self.config_file(run), self.folder(run)
        command = ['tools/train.py', config, '--work-dir', folder, '--resume']
        return Job(run, folder, [*map(str, command)], self.threads, self.lock)

    def trained(self, job: Job) -> None:
        """Record a training that has ended."""
        metric = self.records.settings['metric']
        config = digest(self.config_of(job.run))
        if job.diverged:
            self.records.update(job.run, diverged=True, config=config)
            return
        figures = validation_of(job.folder)
        if figures is None and job.run not in self.unvalidated:
            # A kill between checkpoint and validation: once more, whole.
            shutil.rmtree(job.folder)
            self.unvalidated.add(job.run)
            return
        if figures is not None:
            figures = self.with_nothing_found(figures)
        if metric not in (figures or {}):
            raise ConfigError(
                f'Expected {metric} in the validation of {job.run.name}, but '
                f'found {", ".join(figures or ["nothing"])}. Name one with '
                '--metric, or add `LocalVisBackend` to `visualizer` of the '
                f'config. All of it: {job.log}'
            )
        self.records.update(job.run, validation=figures, config=config)

    def with_nothing_found(self, figures: dict[str, float]) -> dict:
        """Figures of CocoMetric, which has none where nothing is detected."""
        metric = self.records.settings['metric']
        if figures or not metric.startswith('coco/'):
            return figures
        return dict.fromkeys({metric, *COCO}, 0.0)

    def checkpoint(self, run: Run) -> Path | None:
        """The last checkpoint of a run, if it is there."""
        last = self.folder(run) / 'last_checkpoint'
        if not last.exists():
            return None
        # It names a path of the day, and folders are moved.
        path = last.with_name(Path(last.read_text().strip()).name)
        return path if path.exists() else None

    def drop_checkpoints(self, run: Run) -> None:
        """Make room: no one needs those of a run any more."""
        for path in self.folder(run).glob('*.pth'):
            path.unlink()

    def test(self, run: Run) -> Job:
        """Begin the test of a run."""
        folder = self.folder(run)
        command = [
            *('tools/test.py', folder / 'config.py', self.checkpoint(run)),
            *('--work-dir', folder / 'test'),
        ]
        return Job(run, folder, [*map(str, command)], self.threads, self.lock)

    def tested(self, job: Job) -> None:
        """Record a test that has ended; its checkpoint is not needed more."""
        path = sorted((job.folder / 'test').glob('*/*.json'))[-1]
        figures = json.loads(path.read_text().splitlines()[-1])
        figures = {k: v for k, v in figures.items() if k not in TIMES}
        self.records.update(job.run, test=self.with_nothing_found(figures))
        self.drop_checkpoints(job.run)

    def run(self) -> None:
        """Train all that is left, then test."""
        self.check_runs()
        console = Console(stderr=True)
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=console, speed_estimate_period=DAY
        ) as progress:
            self._train_all(progress)
            if not self.args.val_only:
                # Those whose folder is gone are trained anew.
                for run in self.records.to_test():
                    if self.checkpoint(run) is None:
                        self.records.lose(run)
                if self.records.left():
                    self._train_all(progress)
                self._test_all(progress)

    def _train_all(self, progress: Progress) -> None:
        left = self.records.left()
        task = progress.add_task('training', total=left)

        def ended(job: Job) -> None:
            self.trained(job)
            value = self.records.validation(job.run)
            figure = 'nothing' if value is None else f'{value:g}'
            progress.console.print(
                f'{job.run.name}: {figure} on validation, '
                f'{job.minutes:.1f} minutes'
            )
            progress.update(task, completed=left - self.records.left())

        self._in_parallel(
            self.records.to_train, self.train, ended, progress, task
        )
        for method in self.records.methods:
            chosen = self.records.chosen(method)
            for run in self.records.searches(method):
                if run not in chosen:
                    self.drop_checkpoints(run)

    def _test_all(self, progress: Progress) -> None:
        runs = self.records.to_test()
        task = progress.add_task('test', total=len(runs))

        def ended(job: Job) -> None:
            self.tested(job)
            progress.advance(task)

        self._in_parallel(
            self.records.to_test, self.test, ended, progress, task
        )

    def _in_parallel(self, waiting, begin, ended, progress, task) -> None:
        """Keep ``--jobs`` jobs running until none waits."""
        jobs: list[Job] = []
        try:
            while True:
                running = {job.run for job in jobs}
                free = [run for run in waiting() if run not in running]
                while free and len(jobs) < self.args.jobs:
                    job = begin(free.pop(0))
                    jobs.append(job)
                    progress.update(
                        task,
                        description=', '.join(job.run.name for job in jobs),
                    )
                if not jobs:
                    return
                time.sleep(0.2)
                for job in [*jobs]:
                    if job.done():
                        jobs.remove(job)
                        self._spend()
                        ended(job)
                        write_table(self.records, self.args)
        finally:
            for job in jobs:
                job.process.terminate()
            for job in jobs:
                job.process.wait()
            self._spend()

    def _spend(self) -> None:
        self.records.spend(self.spent_before + cpu_seconds())

    def measure(self) -> None:
        """Memory and time of one step of all methods, beside each other."""
        folder = self.args.work_dir.resolve() / 'methods'
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for method in self.records.methods:
            path = folder / f'{method}.py'
            method_config(self.config, method).dump(path)
            paths.append(path)
        figures = folder / 'measured.json'
        command = [sys.executable, 'tools/measure.py', *map(str, paths)]
        command += ['--json', str(figures), '--device', self.args.device]
        if figures.exists():
            command.append('--resume')
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=sys.stderr,
            pass_fds=[self.lock.fileno()],
        )
        if done.returncode:
            raise E3VAError('Measuring has failed; the reason stands above.')
        rows = json.loads(figures.read_text())['variants']
        for method in self.records.methods:
            row = rows[method if len(paths) > 1 else 'as-is']
            del row['config']  # a path of this machine
            size = file_bytes(method_config(self.config, method))
            self.records.update_measured(method, dict(row, file_bytes=size))


def validation_of(folder: Path) -> dict[str, float] | None:
    """The last figures on validation that a run has written."""
    found = None
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a kill has cut it off
                continue
            if 'loss' not in record:
                found = record
    return found and {
        key: value
        for key, value in found.items()
        if isinstance(value, (int, float)) and key not in TIMES
    }


def file_bytes(config: Config) -> int:
    """Bytes of what a task must store: all but the frozen trunk."""
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    state = without_trunks(model, model.state_dict())
    return sum(
        value.numel() * value.element_size() for value in state.values()
    )


def write_table(records: Records, args: argparse.Namespace) -> str:
    """Write the table of what is known; its text."""
    metric = records.settings['metric']
    split = 'validation' if args.val_only else 'test'
    text = markdown(records, COCO if metric == COCO[0] else [metric], split)
    note = (
        f'{HEADINGS.get(metric, (metric, 1))[0]} on the {split} split, mean '
        f'and deviation over {args.seeds} seeds'
    )
    if args.trim:
        note += f', two of {args.trim.replace(",", ", ")}'
    rates = ', '.join(f'{lr:g}' for lr in records.lrs)
    note += (
        f'; the best on validation of the learning rates {rates}; held: by '
        'the backbone when backward begins, its outputs included; measured '
        f'on {args.device}; {records.cpu_seconds / 3600:.1f} hours of one '
        f'core; torch {torch.__version__}.'
    )
    if args.same_pictures:
        note += ' Validation and test are the same pictures here.'
    text = f'{text}\n\n{note}\n'
    write_whole(args.work_dir / 'comparison.md', text.encode())
    return text


def report(records: Records, args: argparse.Namespace) -> None:
    """Write and print the table; draw the pictures."""
    text = write_table(records, args)
    metric = records.settings['metric']
    split = 'validation' if args.val_only else 'test'
    for cost in COSTS:
        figure = draw(records, metric, split, cost)
        figure.savefig(args.work_dir / f'comparison_{cost}.png', dpi=150)
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, train, test, report."""
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel('ERROR')
    if not Path(args.config).is_file():
        raise ConfigError(f'{args.config}: no such config file.')
    config = Config.fromfile(args.config)
    splits = (config.get(f'{n}_dataloader') or {} for n in ('val', 'test'))
    args.same_pictures = len({repr(s.get('dataset')) for s in splits}) == 1
    with locked(args.work_dir) as lock:
        records = records_of(args, config)
        comparison = Comparison(args, config, records, lock)
        if not args.no_measure:
            comparison.measure()
        if not args.measure_only:
            comparison.run()
        report(records, args)


def run_from_shell(argv: Sequence[str] | None = None) -> None:
    """Do it, and say in a line why it has ended early."""
    # What it has started ends with it, as by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        main(argv)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('error: interrupted; the same command goes on')


if __name__ == '__main__':
    run_from_shell()
