"""What processes that train together exchange: gradients, in bytes a step.

    python benchmarks/allreduce_volume.py

Two processes train a config with DDP over gloo on generated input, weights at
random, once for each variant. A communication hook counts the bytes of every
bucket that is handed to the all-reduce, and then does what DDP does without.
The image is small, for the volume does not depend on it.
"""

import argparse
import json
import multiprocessing
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
)

from e3va_mm.measure import VARIANTS, TrainingStep
from e3va_mm.utils import end_process_group

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'cascade_e3va_swin_b_coco.py'
COMPARED = ('full', 'lora', 'exact')
PROCESSES = 2
MIB = 2**20


class ReducedBytes:
    """Counts what DDP reduces; a communication hook.

    Args:
        model (DistributedDataParallel): The wrapped model, before its first
            step.

    Attributes:
        total (int): Bytes so far.
        backbone (int): Those of parameters of the backbone.
    """

    def __init__(self, model: MMDistributedDataParallel) -> None:
        self.total = self.backbone = 0
        backbone = getattr(model.module, 'backbone', nn.Module())
        self._backbone = set(backbone.parameters())
        model.register_comm_hook(None, self._reduce)

    def _reduce(
        self, group: dist.ProcessGroup | None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        self.total += bucket.buffer().nbytes
        self.backbone += sum(
            parameter.nbytes
            for parameter in bucket.parameters()
            if parameter in self._backbone
        )
        return allreduce_hook(group, bucket)


def measure(
    config: Config, variants: Sequence[str], size: int, steps: int = 2
) -> list[dict]:
    """Train each variant in several processes.

    Args:
        config (Config): A detection or segmentation config.
        variants (Sequence[str]): Some of ``e3va_mm.measure.VARIANTS``.
        size (int): Height and width of the images in pixels.
        steps (int): Steps of each; all have to be alike. Defaults to 2.

    Returns:
        list[dict]: Of each variant its name as ``variant``, the bytes of its
        ``parameters`` and of those that are ``trainable``, the bytes that are
        ``reduced`` in one step, and those of them of the ``backbone``.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'tcp://127.0.0.1:{free.getsockname()[1]}'
    context = multiprocessing.get_context('spawn')
    with context.Pool(PROCESSES) as pool:
        found = pool.starmap(
            _train,
            [
                (rank, address, config, variants, size, steps)
                for rank in range(PROCESSES)
            ],
            chunksize=1,
        )
    if any(other != found[0] for other in found):
        raise RuntimeError(f'Processes have counted differently: {found}.')
    return found[0]


def _train(
    rank: int,
    address: str,
    config: Config,
    variants: Sequence[str],
    size: int,
    steps: int,
) -> list[dict]:
    """One process: the figures of :func:`measure`."""
    MMLogger.get_current_instance().setLevel('ERROR')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', address, rank=rank, world_size=PROCESSES)
    rows = _rows(rank, config, variants, size, steps)
    end_process_group()
    return rows


def _rows(
    rank: int,
    config: Config,
    variants: Sequence[str],
    size: int,
    steps: int,
) -> list[dict]:
    """What one process of the group has counted."""
    rows = []
    for variant in variants:
        step = TrainingStep(config, variant, (size, size), 1, seed=rank)
        values = list(step.model.parameters())
        step.model = MMDistributedDataParallel(
            step.model, broadcast_buffers=False
        )
        count = ReducedBytes(step.model)
        seen = []
        for _ in range(steps):
            count.total = count.backbone = 0
            step.run()
            seen.append((count.total, count.backbone))
        if len(set(seen)) > 1:
            raise RuntimeError(f'{variant}: steps differ: {seen}.')
        rows.append(
            dict(
                variant=variant,
                parameters=sum(p.nbytes for p in values),
                trainable=sum(p.nbytes for p in values if p.requires_grad),
                reduced=seen[0][0],
                backbone=seen[0][1],
            )
        )
    return rows


def table(rows: Sequence[dict], title: str) -> Table:
    """The figures of :func:`measure`, in MiB."""
    made = Table(title=title)
    for column in (
        'variant',
        'parameters',
        'trainable',
        'reduced a step',
        'of the backbone',
        '/ first',
    ):
        made.add_column(
            column, justify='left' if column == 'variant' else 'right'
        )
    for row in rows:
        made.add_row(
            row['variant'],
            *(
                f'{row[key] / MIB:,.1f}'
                for key in ('parameters', 'trainable', 'reduced', 'backbone')
            ),
            f'{row["reduced"] / rows[0]["reduced"]:.1%}',
        )
    return made


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', nargs='?', type=Path, default=CONFIG)
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=VARIANTS,
        default=COMPARED,
        metavar='NAME',
        help=f'some of {", ".join(VARIANTS)}; default: {", ".join(COMPARED)}',
    )
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    rows = measure(Config.fromfile(args.config), args.variants, args.size)
    title = f'{args.config.stem}, {PROCESSES} processes, MiB'
    Console(width=100).print(table(rows, title))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
