"""Measure one training step of a config: parameters, memory and time.

    e3va measure CONFIG --compare full,frozen --fits 8,11,24

Takes any detection or segmentation config and generates images of its size
and batch. Memory is accounted (weights, gradients, optimizer state, tensors
kept for backward and temporaries, counted by storage), each variant in a
process of its own. Time is the median over steps that take turns in one
process, so that a machine's changing speed affects all alike. Updates have a
learning rate of zero: heads that sample have the same work in every step and
in every variant.
"""

import argparse
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import Progress

from e3va_mm.commands import launching
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure import VARIANTS, TrainingStep, variant_config
from e3va_mm.measure.batches import BatchSearch
from e3va_mm.measure.fits import (
    averaged_bytes,
    changes,
    is_amp,
    margin_text,
    needed_bytes,
    updated_at_once,
)
from e3va_mm.measure.gpu_model import CARDS, modelled, named_cards
from e3va_mm.measure.own_process import in_own_process
from e3va_mm.measure.report import (
    advice,
    batch_text,
    draw,
    figures_table,
    fits_table,
    gpu_parts_table,
    gpu_table,
    modules_table,
)
from e3va_mm.measure.results import Results, Rows, groups
from e3va_mm.sweep import SharedStep
from e3va_mm.utils.configs import content_key
from e3va_mm.utils.sizes import GIB

# What a figure depends on, beside the config and the machine.
SETTINGS = (
    *('size', 'batch', 'device', 'amp', 'threads', 'warmup', 'steps'),
    *('runs', 'meta'),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va measure``."""
    return launching.exit_code(measure, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'e3va measure',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    variants = '; '.join(f'{k}: {v}' for k, v in VARIANTS.items())
    variants = f'also measure these variants of each config: {variants}'
    add('configs', nargs='+', metavar='CONFIG')
    add('--compare', default='', metavar='A,B', help=variants)
    size = "in pixels; default: the config's"
    add('--size', type=int, nargs=2, metavar=('H', 'W'), help=size)
    batch = "images per step, or auto: the most that --fits' cards hold"
    add('--batch', type=_batch, help=f"{batch}; default: the config's")
    runs = 'runs of an `e3va sweep` that share the step'
    add('--runs', type=int, metavar='N', help=runs)
    add('--steps', type=int, default=5, help='timed steps')
    add('--warmup', type=int, default=2, help='untimed steps')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', default=device, help='cpu, cuda, cuda:1...')
    add('--amp', action='store_true', help='mixed precision')
    meta = "account the backbone on torch's meta device, for one too large "
    add('--meta', action='store_true', help=meta + 'for this machine')
    add('--threads', type=int, help='of torch, on CPU')
    only = parser.add_mutually_exclusive_group()
    only.add_argument('--memory-only', action='store_true')
    only.add_argument('--time-only', action='store_true')
    cards = 'which of these cards hold the step, and what to change'
    add('--fits', metavar='GB,GB', help=cards)
    model = 'model, not measure, the step on these cards: '
    add('--gpu', metavar='CARD,CARD', help=model + ', '.join(CARDS))
    add('--modules', action='store_true', help='bytes kept, by module')
    add('--json', type=Path, help='write the figures to this file')
    resume = 'measure only what the file of --json lacks'
    add('--resume', action='store_true', help=resume)
    add('--plot', type=Path, help='draw a .png or .pdf')
    add('--cfg-options', nargs='+', action=launching.Options, default={})
    return parser


def _batch(text: str) -> int | str:
    return text if text == 'auto' else int(text)


def measure(args: argparse.Namespace) -> None:
    """Count, then take time; print the tables and write the files."""
    _check(args)
    _prepare(args.threads)
    if args.batch == 'auto':
        _report_batches(args)
        return
    rows = planned(args.configs, args.compare)
    for row in rows.values():
        config = _load(row['config'], args)
        row['content'] = content_key(config)
        # What cannot be measured raises before the first measurement.
        variant_config(config, row['variant'])
    header = dict(
        environment=dict(
            torch=torch.__version__,
            python=platform.python_version(),
            device=_device_name(args.device),
            threads=torch.get_num_threads(),
        ),
        arguments={key: getattr(args, key) for key in SETTINGS},
    )
    results = Results(rows, header, args.json, args.resume)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        _count(results, args, progress)
        if not args.memory_only:
            _measure_time(results, args, progress)
    _report(results, args)


def _check(args: argparse.Namespace) -> None:
    """Refuse, before the first measurement, what cannot be measured."""
    try:
        device = torch.device(args.device)
        devices = dict(cpu=1, cuda=torch.cuda.device_count())
        there = (device.index or 0) < devices.get(device.type, 0)
    except RuntimeError:
        there = False
    if not there:
        raise ConfigError(
            f'--device should be cpu or a CUDA device of this machine, but '
            f'got {args.device}.'
        )
    for name, least in dict(
        steps=1, warmup=0, batch=1, threads=1, runs=1
    ).items():
        value = getattr(args, name)
        if value not in (None, 'auto') and value < least:
            raise ConfigError(
                f'--{name} should be at least {least}, but got {value}.'
            )
    if args.resume and not args.json:
        raise ConfigError('--resume needs the file to continue: --json.')
    if args.time_only and (args.fits or args.modules):
        raise ConfigError(
            '--fits and --modules need memory, which --time-only leaves out.'
        )
    if args.meta and (
        not args.memory_only or args.gpu or args.runs or args.device != 'cpu'
    ):
        raise ConfigError(
            '--meta has no backbone to take time of: add --memory-only and '
            '--device cpu, leave out --gpu and --runs.'
        )
    if args.modules and args.runs:
        raise ConfigError('--modules is for one run: leave out --runs.')
    _cards(args.fits)
    named_cards(args.gpu)
    others = (
        *('compare', 'time_only', 'modules', 'gpu', 'json', 'plot'),
        *('runs', 'meta'),
    )
    given = [key for key in others if getattr(args, key)]
    if args.batch == 'auto' and (given or not args.fits):
        raise ConfigError(
            '--batch auto expects --fits, such as --fits 8, and none of '
            f'{", ".join("--" + key.replace("_", "-") for key in others)}. '
            'Measure the batch that it finds for other figures.'
        )
    if args.plot and args.plot.suffix not in ('.png', '.pdf'):
        raise ConfigError(
            f'--plot should end in .png or .pdf, but got {args.plot}.'
        )


def _cards(text: str | None) -> list[float]:
    """Sizes of the cards of ``--fits``, in GB."""
    try:
        sizes = [float(size) for size in text.split(',')] if text else []
    except ValueError:
        sizes = [0.0]
    if not all(size > 0 for size in sizes):
        raise ConfigError(
            '--fits should be sizes in GB with commas between them, such as '
            f'8,11,24, but got {text!r}.'
        )
    return sizes


def _prepare(threads: int | None) -> None:
    """Set up this process, or one of a row's own."""
    # A line for each frozen parameter is of no interest here.
    MMLogger.get_current_instance().setLevel('ERROR')
    keep_freed_memory()  # as in training
    if threads:
        torch.set_num_threads(threads)


def _load(path: str, args: argparse.Namespace) -> Config:
    config = launching.read_config(path, args.cfg_options)
    if args.amp and 'optim_wrapper' in config and not is_amp(config):
        config.optim_wrapper.type = 'AmpOptimWrapper'
    return config


def planned(configs: Sequence[str], compare: str) -> dict[str, dict]:
    """The rows to measure: each config as it is, and its variants."""
    variants = ['as-is', *(v for v in compare.split(',') if v)]
    stems = [Path(path).stem for path in configs]
    names = stems if len(set(stems)) == len(set(configs)) else configs
    rows = {}
    for path, name in zip(configs, names, strict=True):
        for variant in variants:
            label = variant
            if len(configs) > 1:
                label = name if variant == 'as-is' else f'{name} {variant}'
            rows[label] = dict(config=path, variant=variant)
    return rows


def _step(row: dict, args: argparse.Namespace) -> tuple[TrainingStep, dict]:
    """The step of a row, and what is known of it before it runs."""
    kind = TrainingStep
    if args.runs:
        kind = partial(SharedStep, runs=args.runs)
    elif args.meta:
        kind = partial(TrainingStep, on_meta=True)
    step = kind(
        _load(row['config'], args),
        row['variant'],
        tuple(args.size) if args.size else None,
        args.batch,
        device=args.device,
        learn=False,
    )
    images = step.data['inputs']
    return step, dict(
        batch=len(images),
        size=list(images[0].shape[-2:]),
        parameters=step.parameters(),
    )


def _lacking(row: dict, args: argparse.Namespace) -> tuple[bool, bool]:
    """Whether memory and model of a row are asked for and not there."""
    model = next(iter(row.get('gpu_model', {}).values()), dict(cards=()))
    return (
        not args.time_only and 'memory_bytes' not in row,
        not set(named_cards(args.gpu)) <= set(model['cards']),
    )


def counted_of(row: dict, args: argparse.Namespace) -> dict:
    """Figures of one row that are counted, for a process of its own."""
    _prepare(args.threads)
    step, figures = _step(row, args)
    try:
        memory, model = _lacking(row, args)
        if memory:
            figures['memory_bytes'] = step.memory()
        if model:
            cards = named_cards(args.gpu)
            figures['gpu_model'] = modelled(step.launches(), cards)
        return figures
    except torch.cuda.OutOfMemoryError as error:
        raise E3VAError(
            f'{args.device} has too little memory for {row["variant"]} of '
            f'{row["config"]}. Use a smaller --batch or --size, or account it '
            f'with --device cpu --memory-only. ({error})'
        ) from None


def _count(
    results: Results, args: argparse.Namespace, progress: Progress
) -> None:
    rows = {k: r for k, r in results.rows.items() if any(_lacking(r, args))}
    task = progress.add_task('counting', total=len(rows))
    for label, row in rows.items():
        progress.update(task, description=f'counting: {label}')
        figures = in_own_process(
            counted_of,
            row,
            args,
            killed=f'Measuring {row["variant"]} of {row["config"]} was '
            'killed: most likely it needs more memory than there is. '
            'Use a smaller --batch or --size; with --json and '
            '--resume nothing is measured twice.',
        )
        results.update(label, **figures)
        progress.advance(task)


def _measure_time(
    results: Results, args: argparse.Namespace, progress: Progress
) -> None:
    """Seconds of each step of each row, in turns."""
    rounds = args.warmup + args.steps
    for _, rows in groups(results.rows):
        if all('seconds' in row for row in rows.values()):
            continue
        task = progress.add_task('time', total=rounds * len(rows))
        steps = {}
        for label, row in rows.items():
            progress.update(task, description=f'time: building {label}')
            steps[label], figures = _step(row, args)
            row.update(figures)
        seconds = {label: [] for label in rows}
        for _ in range(rounds):
            for label, step in steps.items():
                progress.update(task, description=f'time: {label}')
                seconds[label].append(step.run())
                progress.advance(task)
        for label, taken in seconds.items():
            results.update(label, seconds=taken[args.warmup :])


def _report_batches(args: argparse.Namespace) -> None:
    """Print the largest batch for each card, with lines to paste."""
    for path in args.configs:
        search = BatchSearch(
            _load(path, args),
            args.device,
            tuple(args.size) if args.size else None,
            partial(_prepare, args.threads),
        )
        print(
            f'{path}: {search.total} images an update; assuming '
            f'{search.assumed()}'
        )
        for card in _cards(args.fits):
            print(batch_text(card, search.largest(card)))


def _device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = (x.split(':')[1].strip() for x in lines if 'model name' in x)
    return next(names, platform.machine())


def _report(results: Results, args: argparse.Namespace) -> None:
    """Print the tables; draw the plot."""
    rows = results.rows
    names = ', '.join(dict.fromkeys(Path(p).name for p in args.configs))
    title = f'{names}: one training step'
    if args.runs:
        title += f' of {args.runs} runs together'
    out = Console()
    if not out.is_terminal:  # let no column wrap in a file
        out = Console(width=200)
    out.print(figures_table(rows, title))
    images = {
        f'{row["batch"]} x {row["size"][0]}x{row["size"][1]}'
        for row in rows.values()
    }
    precisions = {
        'mixed precision' if is_amp(_load(path, args)) else 'fp32'
        for path in args.configs
    }
    found = results.header['environment']
    steps = f'; {args.steps} steps after {args.warmup} of warm-up'
    print(
        f'torch {found["torch"]}, {found["device"]}, {found["threads"]} '
        f'threads, {" and ".join(sorted(precisions))}; images '
        f'{", ".join(sorted(images))}{"" if args.memory_only else steps}'
    )
    cards = named_cards(args.gpu)
    if cards:
        out.print(gpu_table(rows, cards))
        for label, row in rows.items():
            out.print(gpu_parts_table(label, row, cards))
    if args.modules:
        out.print(modules_table(rows))
    if args.fits:
        _report_fits(rows, args, out)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, title).savefig(args.plot, dpi=150)


def _report_fits(rows: Rows, args: argparse.Namespace, out: Console) -> None:
    """Print which cards hold which rows, and advice for the configs."""
    cards, needed, texts = _cards(args.fits), {}, []
    for label, row in rows.items():
        config = _load(row['config'], args)
        config.train_dataloader.batch_size = row['batch']
        memory, parameters = row['memory_bytes'], row['parameters']
        needed[label] = needed_bytes(
            memory,
            # The runs of a sweep update one after the other.
            updated_at_once(config, parameters) // (args.runs or 1),
            averaged_bytes(config, memory, parameters),
        )
        if (
            row['variant'] == 'as-is'
            and not args.runs
            and needed[label] > min(cards) * GIB
        ):
            texts.append(advice(label, changes(config, memory, parameters)))
    out.print(fits_table(needed, cards))
    print(f'needs: {margin_text(memory)}')
    print(*(f'\n{text}' for text in texts), sep='\n')
