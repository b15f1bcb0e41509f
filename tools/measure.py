"""Measure one training step of a config: parameters, memory and time.

    python tools/measure.py CONFIG --compare full,frozen --fits 8,11,24

Takes any detection or segmentation config, and generates pictures of its size
and batch. Memory is accounted (weights, gradients, optimizer state, tensors
kept for backward and temporaries, counted by storage), each variant in a
process of its own. Time is the median over steps that take turns in one
process, so that a machine's changing speed falls on all alike. Updates are
done at a learning rate of zero: heads that draw samples have the same work in
every step and in every variant.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('PYTHONWARNINGS', 'ignore')

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import Progress

import e3va_mm.checkpoint  # noqa: F401  checkpoints run no code
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure import VARIANTS, TrainingStep, variant_config
from e3va_mm.measure.fits import fits, is_amp, margin_text
from e3va_mm.measure.report import (
    advice,
    draw,
    figures_table,
    fits_table,
    modules_table,
)
from e3va_mm.measure.results import Results, check_room, groups

# What a figure depends on, beside the config and the machine.
SETTINGS = ('size', 'batch', 'device', 'amp', 'threads', 'warmup', 'steps')
PICTURES = ('.png', '.pdf')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument(
        '--compare',
        default='',
        metavar='A,B',
        help='also measure these variants of each config: '
        + '; '.join(f'{k}: {v}' for k, v in VARIANTS.items()),
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="in pixels; default: the config's",
    )
    parser.add_argument(
        '--batch', type=int, help="pictures a step; default: the config's"
    )
    parser.add_argument('--steps', type=int, default=5, help='timed steps')
    parser.add_argument('--warmup', type=int, default=2, help='untimed steps')
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu, cuda, cuda:1...; default: cuda where there is one',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--threads', type=int, help='of torch, on CPU')
    only = parser.add_mutually_exclusive_group()
    only.add_argument('--memory-only', action='store_true')
    only.add_argument('--time-only', action='store_true')
    parser.add_argument(
        '--fits',
        metavar='GB,GB',
        help='which of these cards hold the step, and what to change',
    )
    parser.add_argument(
        '--modules', action='store_true', help='bytes kept, by module'
    )
    parser.add_argument('--json', type=Path, help='write the figures here')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='measure only what the file of --json lacks',
    )
    parser.add_argument('--plot', type=Path, help='draw a .png or .pdf')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}
    )
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse, before the first measurement, what cannot be had."""
    if not is_there(args.device):
        raise ConfigError(
            f'--device should be cpu or a CUDA device of this machine, but '
            f'got {args.device}.'
        )
    for name, least in dict(steps=1, warmup=0, batch=1, threads=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(
                f'--{name} should be at least {least}, but got {value}.'
            )
    if args.resume and not args.json:
        raise ConfigError('--resume needs the file to go on with: --json.')
    if args.time_only and (args.fits or args.modules):
        raise ConfigError(
            '--fits and --modules are about memory, but --time-only leaves it '
            'out.'
        )
    if args.fits:
        sizes(args.fits)
    if args.plot and args.plot.suffix not in PICTURES:
        raise ConfigError(
            f'--plot should end in {" or ".join(PICTURES)}, but got '
            f'{args.plot}.'
        )


def is_there(device: str) -> bool:
    """Whether this machine has a device."""
    try:
        device = torch.device(device)
    except RuntimeError:
        return False
    if device.type == 'cuda':
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == 'cpu'


def sizes(text: str) -> list[float]:
    """The cards of ``--fits``, in GB."""
    try:
        found = [float(size) for size in text.split(',')]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise ConfigError(
            '--fits should be sizes in GB with commas between them, such as '
            f'8,11,24, but got {text!r}.'
        )
    return found


def load(path: str, args: argparse.Namespace) -> Config:
    """A config, as the command line changes it."""
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such config file.')
    config = Config.fromfile(path)
    config.merge_from_dict(args.cfg_options)
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


def step_of(row: dict, args: argparse.Namespace) -> TrainingStep:
    """The step of a row, as the command line asks for it."""
    return TrainingStep(
        load(row['config'], args),
        row['variant'],
        tuple(args.size) if args.size else None,
        args.batch,
        device=args.device,
        amp=args.amp,
        learn=False,
    )


def inputs_of(step: TrainingStep) -> dict:
    """Batch and size of the generated pictures."""
    pictures = step.data['inputs']
    return dict(batch=len(pictures), size=list(pictures[0].shape[-2:]))


def memory_in_subprocess(row: dict, argv: Sequence[str]) -> dict:
    """This command again, for the parameters and the memory of one row."""
    done = subprocess.run(
        [
            *(sys.executable, __file__, *argv),
            *('--memory-of', row['config'], row['variant']),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode < 0:
        raise E3VAError(
            f'Measuring {row["variant"]} of {row["config"]} was ended by '
            f'signal {-done.returncode}: most likely it needs more memory '
            'than there is. Take a smaller --batch or --size; --json and '
            '--resume keep what is measured.'
        )
    if done.returncode:  # it has said why on stderr
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(args: argparse.Namespace) -> None:
    """What :func:`memory_in_subprocess` reads: a line of JSON."""
    config, variant = args.memory_of
    step = step_of(dict(config=config, variant=variant), args)
    try:
        memory = step.memory()
    except torch.cuda.OutOfMemoryError as error:
        raise E3VAError(
            f'{args.device} has too little memory for {variant} of {config}. '
            'Take a smaller --batch or --size, or account it with '
            f'--device cpu --memory-only. ({error})'
        ) from error
    figures = dict(
        inputs_of(step), parameters=step.parameters(), memory_bytes=memory
    )
    print(json.dumps(figures))


def free_bytes(device: str) -> int | None:
    """Memory that is free on a device; None where that is not known."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
    except OSError:
        return None
    table = dict(line.split(':') for line in lines)
    return int(table['MemAvailable'].split()[0]) * 1024


def seconds(
    rows: dict[str, dict], args: argparse.Namespace, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of each step of each row, in turns."""
    rounds = args.warmup + args.steps
    task = progress.add_task('time', total=rounds * len(rows))
    steps = {}
    for label, row in rows.items():
        progress.update(task, description=f'time: making {label}')
        steps[label] = step_of(row, args)
        row.update(inputs_of(steps[label]))
        row.setdefault('parameters', steps[label].parameters())
    taken = {label: [] for label in rows}
    for turn in range(rounds):
        for label, step in steps.items():
            progress.update(task, description=f'time: {label}')
            time = step.run()
            if turn >= args.warmup:
                taken[label].append(time)
            progress.advance(task)
    return taken


def measure(
    results: Results, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Fill in what is missing: memory row by row, time group by group."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        if not args.time_only:
            missing = [
                k for k, r in results.rows.items() if 'memory_bytes' not in r
            ]
            task = progress.add_task('memory', total=len(missing))
            for label in missing:
                progress.update(task, description=f'memory: {label}')
                row = results.rows[label]
                results.update(label, **memory_in_subprocess(row, argv))
                progress.advance(task)
        if args.memory_only:
            return
        for rows in groups(results.rows):
            if all('seconds' in row for row in rows.values()):
                continue
            check_room(rows, free_bytes(args.device))
            for label, times in seconds(rows, args, progress).items():
                results.update(label, seconds=times)


def environment(args: argparse.Namespace) -> dict:
    """What the figures were measured with."""
    name = _cpu_name()
    if torch.device(args.device).type == 'cuda':
        name = torch.cuda.get_device_name(args.device)
    return dict(
        torch=torch.__version__,
        python=platform.python_version(),
        device=name,
        threads=torch.get_num_threads(),
    )


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(':')[1] for line in lines if 'model name' in line]
    return names[0].strip() if names else platform.machine()


def content_key(config: Config) -> str:
    """The same for configs with the same content."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def report(results: Results, args: argparse.Namespace) -> None:
    """Print the tables; draw the picture."""
    rows = results.rows
    title = ', '.join(dict.fromkeys(Path(p).name for p in args.configs))
    out = Console()
    if not out.is_terminal:  # let no column wrap in a file
        out = Console(width=200)
    out.print(figures_table(rows, f'{title}: one training step'))
    inputs = {
        f'{row["batch"]} x {row["size"][0]}x{row["size"][1]}'
        for row in rows.values()
    }
    precisions = {
        'mixed precision' if args.amp or is_amp(load(path, args)) else 'fp32'
        for path in args.configs
    }
    found = results.header['environment']
    print(
        f'torch {found["torch"]}, {found["device"]}, {found["threads"]} '
        f'threads, {" and ".join(sorted(precisions))}; pictures '
        f'{", ".join(sorted(inputs))}'
        + (
            ''
            if args.memory_only
            else f'; {args.steps} steps after {args.warmup} of warm-up'
        )
    )
    if args.modules:
        out.print(modules_table(rows))
    if args.fits:
        report_fits(rows, args, out)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, f'{title}: one training step').savefig(args.plot, dpi=150)


def report_fits(rows: dict, args: argparse.Namespace, out: Console) -> None:
    """Print which cards hold which rows, and advice for the configs."""
    verdicts = {}
    for label, row in rows.items():
        config = load(row['config'], args)
        config.train_dataloader.batch_size = row['batch']
        if args.amp and not is_amp(config):
            config.optim_wrapper.type = 'AmpOptimWrapper'
        verdicts[label] = fits(
            row['memory_bytes'], sizes(args.fits), config, row['parameters']
        )
    out.print(fits_table(verdicts))
    first = next(iter(rows.values()))
    print(f'needs: {margin_text(first["memory_bytes"])}')
    for label, row in rows.items():
        text = row['variant'] == 'as-is' and advice(label, verdicts[label])
        if text:
            print(f'\n{text}')


def main(argv: Sequence[str] | None = None) -> None:
    """Measure memory, then time; print the tables and write the files."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # One line for each frozen parameter is no news here.
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(args)
        return
    check(args)
    rows = planned(args.configs, args.compare)
    for row in rows.values():
        config = load(row['config'], args)
        row['content'] = content_key(config)
        # What cannot be measured is said before the first measurement.
        variant_config(config, row['variant'])
    header = dict(
        environment=environment(args),
        arguments={key: getattr(args, key) for key in SETTINGS},
    )
    results = Results(rows, header, args.json, args.resume)
    measure(results, args, argv)
    report(results, args)


if __name__ == '__main__':
    keep_freed_memory()  # as in training
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
