"""Measure one training step of a config: parameters, memory and time.

    python tools/measure.py CONFIG --compare full,frozen

Memory is accounted (weights, gradients, optimizer state and live tensors,
counted by storage), each variant in a process of its own. Time is the median
over steps that take turns in one process, so that a machine's changing speed
falls on all alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('PYTHONWARNINGS', 'ignore')

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table

from e3va_mm.errors import E3VAError
from e3va_mm.measure import VARIANTS, TrainingStep

MIB = 2**20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config')
    parser.add_argument(
        '--compare',
        default='',
        metavar='A,B',
        help='also measure these variants: '
        + '; '.join(f'{k}: {v}' for k, v in VARIANTS.items()),
    )
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help='in pixels'
    )
    parser.add_argument('--batch', type=int, help='pictures a step')
    parser.add_argument('--steps', type=int, default=5, help='timed steps')
    parser.add_argument('--warmup', type=int, default=2, help='untimed steps')
    parser.add_argument('--json', type=Path, help='write the figures here')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}
    )
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def step_of(args: argparse.Namespace, variant: str) -> TrainingStep:
    """The step of a variant, as the command line asks for it."""
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    size = tuple(args.size) if args.size else None
    return TrainingStep(config, variant, size, args.batch)


def memory_in_subprocess(variant: str) -> dict:
    """This command again, for the memory of one variant."""
    done = subprocess.run(
        [sys.executable, *sys.argv, '--memory-of', variant],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:  # it has said why on stderr
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(args: argparse.Namespace, variants: list[str]) -> dict:
    """Seconds of each step of each variant, in turns."""
    steps = {variant: step_of(args, variant) for variant in variants}
    taken = {variant: [] for variant in variants}
    rounds = range(args.warmup + args.steps)
    for turn in track(
        rounds, 'timing', console=Console(stderr=True), transient=True
    ):
        for variant, step in steps.items():
            time = step.run()
            if turn >= args.warmup:
                taken[variant].append(time)
    return taken


def table(rows: dict, title: str) -> Table:
    """The figures as people read them."""
    made = Table(title=title)
    for column in (
        'variant',
        'trainable',
        'of the backbone',
        'peak MiB',
        'weights',
        'gradients',
        'optimizer',
        's/step',
        'min-max',
    ):
        made.add_column(
            column, justify='left' if column == 'variant' else 'right'
        )
    for variant, row in rows.items():
        memory, times = row['memory_bytes'], row['seconds']
        made.add_row(
            variant,
            f'{row["parameters"]["trainable"]:,}',
            f'{row["parameters"]["trainable_backbone"]:,}',
            *(
                f'{memory[k] / MIB:,.1f}'
                for k in ('peak', 'weights', 'gradients', 'optimizer')
            ),
            f'{statistics.median(times):.3f}',
            f'{min(times):.3f}-{max(times):.3f}',
        )
    return made


def main() -> None:
    """Measure memory, then time; print the table and write the JSON."""
    args = parse_args()
    # One line for each frozen parameter is no news here.
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.memory_of:
        step = step_of(args, args.memory_of)
        print(
            json.dumps(
                dict(parameters=step.parameters(), memory_bytes=step.memory())
            )
        )
        return
    variants = ['e3va', *(v for v in args.compare.split(',') if v)]
    rows = {}
    for variant in track(
        variants, 'memory', console=Console(stderr=True), transient=True
    ):
        rows[variant] = memory_in_subprocess(variant)
    for variant, times in seconds(args, variants).items():
        rows[variant]['seconds'] = times
    environment = dict(
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
    )
    Console(width=120).print(
        table(rows, f'{Path(args.config).name}: one training step')
    )
    print(
        f'torch {environment["torch"]}, CPU, '
        f'{environment["threads"]} threads; {args.steps} steps after '
        f'{args.warmup} of warm-up'
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(dict(environment=environment, variants=rows), indent=2)
        )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
