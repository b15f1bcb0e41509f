"""Several side paths on one pass of their trunk, and each on its own.

    python benchmarks/shared_trunk.py --backbone swin-l --tasks 3

Seconds of a forward pass without gradients, heads left out, as they are the
same in all; relative to the trunk alone under the same options. Variants take
turns, so that a machine's changing speed falls on all alike. Weights are
random; the outputs of both ways are compared, too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import e3va_mm.checkpoint  # noqa: F401 changes the frameworks
from benchmarks.backbone import BACKBONES, build
from e3va_mm.backbones.trunk_pass import run_trunk

PRESETS = {'exact': 'frozen-same', 'lean': 'frozen-lean'}
MIB = 2**20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--backbone', choices=BACKBONES, default='swin-l')
    parser.add_argument('--preset', choices=PRESETS, default='exact')
    parser.add_argument('--tasks', type=int, default=3)
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512))
    parser.add_argument('--steps', type=int, default=9)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    return parser.parse_args(argv)


def tuned(preset: str, name: str, seed: int) -> nn.Module:
    """A backbone whose side path does something."""
    backbone = build(preset, name).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.side_path.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
    return backbone


def seconds(
    variants: dict[str, Callable[[Tensor], object]],
    image: Tensor,
    steps: int,
    warmup: int,
) -> dict[str, list[float]]:
    """Seconds of each pass of each variant, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    console = Console(stderr=True)
    for turn in track(range(warmup + steps), 'seconds', console=console):
        for name, run in variants.items():
            start = time.perf_counter()
            run(image)
            if image.is_cuda:
                torch.cuda.synchronize()
            if turn >= warmup:
                taken[name].append(time.perf_counter() - start)
    return taken


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel('ERROR')
    alone = build(PRESETS[args.preset], args.backbone).eval().to(args.device)
    backbones = []
    for seed in range(args.tasks):
        each = tuned(args.preset, args.backbone, seed).to(args.device)
        # Each on a trunk of the same weights; apart each has its own.
        each.share_trunk(backbones[0] if backbones else each)
        backbones.append(each)
    torch.manual_seed(0)
    image = torch.randn(1, 3, *args.size, device=args.device)
    variants = {
        'the trunk alone': alone,
        'one task': backbones[0],
        f'{args.tasks} tasks apart': lambda x: [b(x) for b in backbones],
        f'{args.tasks} tasks on one pass': lambda x: run_trunk(backbones, x),
    }
    with torch.no_grad():
        taken = seconds(variants, image, args.steps, args.warmup)
        apart, shared = (run(image) for run in [*variants.values()][-2:])
    table = Table(
        'forward pass',
        'seconds (min-max)',
        '/ trunk',
        title=f'{args.backbone}, {args.preset}, 1x{args.size[0]}x'
        f'{args.size[1]}, {args.device}',
    )
    base = statistics.median(taken['the trunk alone'])
    for name, times in taken.items():
        median = statistics.median(times)
        table.add_row(
            name,
            f'{median:.3f} ({min(times):.3f}-{max(times):.3f})',
            f'{median / base:.2f}',
        )
    Console().print(table)
    difference = max(
        (a - b).abs().max().item()
        for one, other in zip(apart, shared, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    trunk = sum(
        value.nbytes
        for value in backbones[0].parameters()
        if not value.requires_grad
    )
    print(
        f'largest difference of outputs: {difference:.1e}\n'
        f'weights of the trunk: {trunk / MIB:,.0f} MiB once, '
        f'{args.tasks * trunk / MIB:,.0f} MiB apart'
    )


if __name__ == '__main__':
    main()
