"""Several runs on one pass of their trunk, and each on its own.

    python benchmarks/sweep.py w2 --runs 4 --size 304 500

Seconds of a whole training step under the preset `lean`, of N runs together
and of one apart, N times; on a CPU in process time, over all threads. They
take turns in one process, so that a machine's changing speed falls on both
alike. The accounted peaks are those of one more step of each. Weights are
random, and updates have a learning rate of zero.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table

from e3va_mm.measure import TrainingStep
from e3va_mm.registry import install
from e3va_mm.sweep import SharedStep

ROOT = Path(__file__).resolve().parents[1]
# Those of benchmarks/workloads.sh: config, size, images.
WORKLOADS = {
    'w1': ('cascade_e3va_swin_b_coco.py', (800, 1216), 1),
    'w2': ('retinanet_e3va_swin_l_voc.py', (608, 1000), 2),
    'w3': ('upernet_e3va_swin_l_ade20k.py', (512, 512), 2),
}
MIB = 2**20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('workload', choices=WORKLOADS)
    parser.add_argument('--runs', type=int, default=4)
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'))
    parser.add_argument('--batch', type=int)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    return parser.parse_args(argv)


def timed(step: TrainingStep, device: str) -> float:
    """Seconds of a step: of the process on a CPU, which others may use."""
    before = time.process_time()
    seconds = step.run()
    if device == 'cpu':
        return time.process_time() - before
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    args = parse_args(argv)
    install()
    MMLogger.get_current_instance().setLevel('ERROR')
    name, size, batch = WORKLOADS[args.workload]
    size, batch = tuple(args.size or size), args.batch or batch
    config = Config.fromfile(ROOT / 'configs' / name)
    config.merge_from_dict({'model.backbone.tuner.preset': 'lean'})
    arguments = (config, 'as-is', size, batch)
    options = dict(device=args.device, learn=False)
    steps = {
        'one run': TrainingStep(*arguments, **options),
        'together': SharedStep(*arguments, runs=args.runs, **options),
    }
    seconds = {name: [] for name in steps}
    console = Console(stderr=True)
    for turn in track(range(args.warmup + args.steps), console=console):
        for name, step in steps.items():
            repeats = args.runs if name == 'one run' else 1
            taken = sum(timed(step, args.device) for _ in range(repeats))
            if turn >= args.warmup:
                seconds[name].append(taken)
    peaks = {}
    for name in list(steps):
        peaks[name] = steps.pop(name).memory()['peak']
        gc.collect()
    table = Table(
        f'{args.runs} runs',
        's/step (min-max)',
        '/ apart',
        'peak MiB',
        title=f'{args.workload}, lean, {batch}x{size[0]}x{size[1]}, '
        f'{args.device}, {torch.get_num_threads()} threads',
    )
    apart = statistics.median(seconds['one run'])
    for label, name in (('apart', 'one run'), ('together', 'together')):
        median = statistics.median(seconds[name])
        spread = f'{min(seconds[name]):.2f}-{max(seconds[name]):.2f}'
        table.add_row(
            label,
            f'{median:.2f} ({spread})',
            f'{median / apart:.2f}',
            f'{peaks[name] / MIB:,.0f}',
        )
    Console().print(table)
    print('peak of apart: that of one run, one after the other')


if __name__ == '__main__':
    main()
