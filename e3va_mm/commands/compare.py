"""Train, test and measure every tuner on one config, under one protocol.

    e3va compare CONFIG --methods all --seeds 3

Each method trains by the config's schedule with three learning rates; the one
that is best on validation trains with the other seeds. When all are trained,
their last checkpoints are tested, once. Memory and time are measured beside
each other in the same run. If interrupted, rerun the command to resume.
WORK_DIR holds comparison.json (all figures), comparison.md (the table) and two
plots.
"""

import argparse
import fcntl
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO

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

from e3va_mm.commands import launching, measure
from e3va_mm.comparison import (
    METHODS,
    SIDE_PATHS,
    Jobs,
    Records,
    Run,
    draw,
    markdown,
    method_config,
)
from e3va_mm.comparison.jobs import COCO
from e3va_mm.comparison.records import AUTO
from e3va_mm.comparison.report import COSTS, heading
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.measure.variants import ON_PLAIN, kind_of
from e3va_mm.registry import install
from e3va_mm.utils.configs import class_name, content_key
from e3va_mm.utils.files import write_whole
from e3va_mm.weights import without_trunks

# Time left is estimated from all trainings of a day, in seconds.
DAY = 86400
# Evaluators and the metric that each is known by.
METRICS = {
    'CocoMetric': 'coco/bbox_mAP',
    'VOCMetric': 'pascal_voc/mAP',
    'IoUMetric': 'mIoU',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va compare``."""
    args = _parser().parse_args(argv)
    # What it has started ends with it, as with Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return launching.exit_code(compare, args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'e3va compare',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', metavar='CONFIG')
    methods = f'all (without {", ".join(ON_PLAIN)}, which need a plain ViT), '
    methods += f'or some of {", ".join((*METHODS, *SIDE_PATHS))}, each maybe '
    methods += 'with options of its tuner, as in mona:last=4'
    add('--methods', default='all', metavar='A,B', help=methods)
    add('--seeds', type=int, default=3)
    rates, lrs = 'learning rates to choose from', [1e-3, 2e-3, 4e-3]
    add('--lrs', type=float, nargs='+', default=lrs, help=rates)
    trim = 'two seeds for these methods, which are far off the others'
    add('--trim', default='', metavar='A,B', help=trim)
    metric = 'what chooses, the greater the better; default: the first or '
    metric += 'best known of the evaluator, such as coco/bbox_mAP or mIoU'
    add('--metric', help=metric)
    add('--jobs', type=int, default=1, help='trainings beside each other')
    folder = 'default: work_dirs/compare/ and the name of the config'
    add('--work-dir', type=Path, help=folder)
    add('--val-only', action='store_true', help='leave the test split alone')
    only = parser.add_mutually_exclusive_group()
    for name, text in (
        ('--measure-only', 'train nothing'),
        ('--no-measure', 'no memory and time'),
    ):
        only.add_argument(name, action='store_true', help=text)
    add('--device', default='cpu', help='to measure on; default: cpu')
    return parser


def compare(args: argparse.Namespace) -> None:
    """Measure, train, test, report."""
    install()
    MMLogger.get_current_instance().setLevel('ERROR')
    config = launching.read_config(args.config)
    if args.work_dir is None:
        args.work_dir = Path('work_dirs/compare', Path(args.config).stem)
    splits = (config.get(f'{n}_dataloader') or {} for n in ('val', 'test'))
    args.same_images = len({repr(s.get('dataset')) for s in splits}) == 1
    with _locked(args.work_dir) as lock:
        records = _records(args, config)
        if not args.no_measure:
            _measure(args, config, records)
        if not args.measure_only:
            _run(args, config, records, lock)
        print(write_table(records, args))
        split = 'validation' if args.val_only else 'test'
        for cost in COSTS:
            figure = draw(records, records.metric, split, cost)
            figure.savefig(args.work_dir / f'comparison_{cost}.png', dpi=150)


def _locked(work_dir: Path) -> IO:
    """A file that one comparison, and what it has started, can hold."""
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = (work_dir / '.lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise E3VAError(
            f'Another comparison runs in {work_dir}, or a training that one '
            'has left behind. Wait for it or end it, or name another folder '
            'with --work-dir.'
        ) from None
    return lock


def _records(args: argparse.Namespace, config: Config) -> Records:
    """The records that the command line asks for."""
    for name in ('seeds', 'jobs'):
        value = getattr(args, name)
        if value < 1:
            raise ConfigError(
                f'--{name} should be at least 1, but got {value}.'
            )
    every = (*METHODS, *SIDE_PATHS)
    names = [n for n in args.methods.split(',') if n]
    methods = names
    if args.methods == 'all':
        methods = [name for name in every if name not in ON_PLAIN]
    trimmed = [n for n in args.trim.split(',') if n]
    for option, found, known in (
        ('--methods', [*map(kind_of, methods)] or [''], every),
        ('--trim', trimmed, methods),
    ):
        for name in found:
            if name not in known:
                raise ConfigError(
                    f'{option} should be some of {", ".join(known)}, but got '
                    f'{name!r}.'
                )
    settings = dict(
        config=Path(args.config).name,
        content=content_key(config),
        metric=args.metric or metric_of(config),
        torch=torch.__version__,
    )
    seeds = dict.fromkeys(methods, args.seeds)
    seeds.update(dict.fromkeys(trimmed, min(2, args.seeds)))
    return Records(args.work_dir, settings, methods, args.lrs, seeds)


def metric_of(config: Config) -> str:
    """The metric that the config's evaluator is known by, else its first."""
    found = config.get('val_evaluator') or []
    evaluators = found if isinstance(found, Sequence) else [found]
    names = [class_name(evaluator) for evaluator in evaluators]
    for name, metric in METRICS.items():
        if name in names:
            return metric
    if not names:
        raise ConfigError(
            'Expected `val_evaluator` in the config, whose metric chooses the '
            'learning rate. Set it.'
        )
    return AUTO


def _measure(
    args: argparse.Namespace, config: Config, records: Records
) -> None:
    """Memory and time of one step of all methods, beside each other."""
    folder = args.work_dir.resolve() / 'methods'
    folder.mkdir(parents=True, exist_ok=True)
    configs = {m: method_config(config, m) for m in records.methods}
    paths = [folder / f'{method}.py' for method in configs]
    for path, changed in zip(paths, configs.values(), strict=True):
        changed.dump(path)
    figures = folder / 'measured.json'
    resume = ['--resume'] if figures.exists() else []
    with redirect_stdout(sys.stderr):
        code = measure.main(
            [
                *(*map(str, paths), '--json', str(figures), *resume),
                *('--device', args.device),
            ]
        )
    if code:
        raise E3VAError('Measuring has failed; the reason is printed above.')
    rows = json.loads(figures.read_text())['variants']
    for method, changed in configs.items():
        row = dict(rows[method if len(paths) > 1 else 'as-is'])
        del row['config']  # a path of this machine
        row['file_bytes'] = file_bytes(changed)
        records.measured[method] = row
    records.write()


def file_bytes(config: Config) -> int:
    """Bytes of what a task must store: all but the frozen trunk."""
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    state = without_trunks(model, model.state_dict())
    return sum(value.nbytes for value in state.values())


def _run(
    args: argparse.Namespace, config: Config, records: Records, lock: IO
) -> None:
    """Train all that is left, then test, under a bar with the time left."""
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), speed_estimate_period=DAY
    ) as progress:
        left = records.left()
        training = progress.add_task('training', total=left)
        test = progress.add_task('test', total=None, visible=False)

        def on_end(run: Run, figures: dict) -> None:
            write_table(records, args)
            if 'test' in figures:
                progress.advance(test)
                return
            value = records.validation(run)
            progress.console.print(f'{run.name}: {value:g} on validation')
            progress.update(training, completed=left - records.left())

        jobs = Jobs(config, records, args.work_dir, args.jobs, lock, on_end)
        jobs.train()
        if not args.val_only:
            progress.update(test, total=len(records.to_test()), visible=True)
            jobs.test()


def write_table(records: Records, args: argparse.Namespace) -> str:
    """Write the table of what is known; its text."""
    metric = records.metric
    split = 'validation' if args.val_only else 'test'
    metrics = COCO if metric in COCO else [metric]
    note = [
        f'{heading(metric)} on the {split} split, mean and deviation over '
        f'{args.seeds} seeds',
        'the best on validation of the learning rates '
        + ', '.join(f'{lr:g}' for lr in records.lrs),
        'held: by the backbone when backward begins, its outputs included',
        f'measured on {args.device}',
        f'{records.cpu_seconds / 3600:.1f} hours of one core',
        f'torch {torch.__version__}.',
    ]
    if args.trim:
        note[0] += f', two of {args.trim.replace(",", ", ")}'
    if args.same_images:
        note[-1] += ' Validation and test are the same images here.'
    text = f'{markdown(records, metrics, split)}\n\n{"; ".join(note)}\n'
    write_whole(args.work_dir / 'comparison.md', text.encode())
    return text
