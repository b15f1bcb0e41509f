"""Steps that read the trunk's activations from disk beside live ones.

    python benchmarks/trunk_cache.py --case swin-l --dtype int4
    python benchmarks/trunk_cache.py --case dinov2-s --whole
    python benchmarks/trunk_cache.py --losses 12

Seconds are of the processor, on one thread: of forward and backward of the
backbone, and with --whole of a whole step of a RetinaNet. Weights are random,
and so are side paths; the cosine of outputs and of gradients says what the
form of the entries costs. Reading is timed on the clock, from memory and after
the file was dropped from it; the disk speed from which the cache pays follows.
With --losses the nano RetinaNet trains that many epochs on the same four views
of 16 images of digits, without and with a cache, and its losses are compared.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.backbones.trunk_cache import CODECS
from e3va_mm.datasets.digits import build_dataset
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure import TrainingStep
from e3va_mm.registry import install

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SWIN = Config.fromfile(ROOT / 'configs/retinanet_e3va_swin_l_voc.py')
# The small DINOv2 in place of the Swin: patches of 14 pixels, one map.
DINOV2 = dict(
    _delete_=True,
    type='e3va_mm.E3VAVisionTransformer',
    trunk_type='mmpretrain.VisionTransformer',
    arch='dinov2-small',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_indices=(11,),
    final_norm=True,
)
PYRAMID = dict(
    _delete_=True,
    type='e3va_mm.SimpleFeaturePyramid',
    in_channels=384,
    out_channels=256,
    num_outs=5,
)
CASES = {
    'swin-l': ((608, 1000), {}),
    'dinov2-s': (
        (448, 336),
        {
            'model.backbone': DINOV2,
            'model.neck': PYRAMID,
            'model.data_preprocessor.pad_size_divisor': 28,
        },
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--case', choices=CASES, default='dinov2-s')
    parser.add_argument('--tuner', default='E3VA')
    parser.add_argument('--preset', default='lean')
    parser.add_argument('--dtype', nargs='+', choices=CODECS, default=[])
    parser.add_argument('--size', type=int, nargs=2)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--whole', action='store_true')
    parser.add_argument('--losses', type=int, metavar='EPOCHS')
    parser.add_argument('--dir', help='where entries go; a temporary folder')
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> TrainingStep:
    """The RetinaNet of a case; its side path does something."""
    size, changes = CASES[args.case]
    config = Config(SWIN.to_dict())
    config.merge_from_dict(changes)
    config.model.backbone.tuner = dict(type=args.tuner, preset=args.preset)
    config.model.backbone.trunk_cache = dict(dir='unused')
    step = TrainingStep(
        config, size=tuple(args.size or size), batch=1, learn=False
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in step.model.backbone.side_path.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
    return step


def run(backbone: nn.Module, image: Tensor) -> tuple[list, list]:
    """Forward and backward; outputs and gradients."""
    outputs = backbone(image)
    torch.manual_seed(0)
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    gradients = []
    for parameter in backbone.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            parameter.grad = None
    return [o.detach() for o in outputs], gradients


def seconds(
    action: Callable[[], object],
    steps: int,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Median seconds of an action, after one to warm up."""
    taken = []
    for _ in range(steps + 1):
        start = clock()
        action()
        taken.append(clock() - start)
    return statistics.median(taken[1:])


def drop(path: Path) -> None:
    """Have the next reading of a file come from the disk."""
    with path.open('rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cosine(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all values of two lists of tensors."""
    one, other = (
        torch.cat([t.flatten().double() for t in tensors])
        for tensors in (ours, theirs)
    )
    return float(F.cosine_similarity(one, other, 0))


def train(folder: Path, epochs: int, dtype: str | None) -> list[float]:
    """Losses of each iteration, with a cache if there is a dtype."""
    config = Config.fromfile(
        ROOT / 'configs/retinanet_e3va_swin_nano_digits.py'
    )
    dataset = config.train_dataloader.dataset
    dataset.data_root = str(folder / 'coco')
    config.merge_from_dict(
        {
            'train_cfg.max_epochs': epochs,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'default_hooks.checkpoint': None,
            'log_level': 'ERROR',
            'work_dir': str(folder / 'work'),
        }
    )
    config.train_dataloader.dataset = dict(
        type='e3va_mm.FixedViews', dataset=dataset, views=4
    )
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        config[key] = None
    config.custom_hooks = []
    if dtype:
        config.custom_hooks = [dict(type='e3va_mm.TrunkCacheHook')]
        config.model.backbone.trunk_cache = dict(
            dir=str(folder / 'cache'), views=4, dtype=dtype
        )
    losses = []
    hook = Hook()
    hook.after_train_iter = lambda *_, outputs=None, **__: losses.append(
        float(outputs['loss'])
    )
    config.experiment_name = f'{folder.name}_{dtype}'
    runner = Runner.from_cfg(config)
    runner.register_hook(hook)
    runner.train()
    return losses


def compare_losses(epochs: int) -> None:
    """Print how far losses with a cache are from those without."""
    table = Table('entries', 'last epoch', 'largest difference')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_dataset(folder, train=16, val=1, test=1, size=224)
        live = train(folder, epochs, None)
        count = len(live) // epochs
        for dtype in (None, *CODECS):
            losses = train(folder, epochs, dtype) if dtype else live
            differences = [
                abs(ours / theirs - 1)
                for ours, theirs in zip(losses, live, strict=True)
            ]
            table.add_row(
                dtype or 'live',
                f'{statistics.mean(losses[-count:]):.4f}',
                f'{max(differences):.2%}',
            )
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    install()
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel('ERROR')
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.losses:
        compare_losses(args.losses)
        return
    step = build(args)
    backbone = step.model.backbone
    batch = step.model.data_preprocessor(step.data, True)
    image = batch['inputs']
    table = Table(title=f'{args.case}, {args.tuner} {args.preset}')
    for name in (
        *('entries', 'MiB', 's/step', '/ live', 's whole', '/ live'),
        *('read warm, s', 'cold, s', 'pays from MiB/s', 'outputs', 'grads'),
    ):
        table.add_column(name, justify='right')
    live = seconds(lambda: run(backbone, image), args.steps)
    whole = seconds(step.run, args.steps) if args.whole else 0
    exact = run(backbone, image)
    table.add_row(
        *('live', '', f'{live:.2f}', '1.00'),
        *([f'{whole:.2f}', '1.00'] if whole else ['', '']),
    )
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for dtype in args.dtype or CODECS:
            cache = type(backbone.trunk_cache)(dir=folder, dtype=dtype)
            backbone.trunk_cache = cache
            cache.open(Path(folder) / dtype, 2)
            found = run(backbone, image)
            cached = seconds(lambda: run(backbone, image), args.steps)
            (path,) = cache.folder.glob('*/*')
            warm, cold = [], []
            for _ in range(3):
                for times, prepare in (
                    (warm, lambda path: None),
                    (cold, drop),
                ):
                    prepare(path)
                    start = time.perf_counter()
                    path.read_bytes()
                    times.append(time.perf_counter() - start)
            row = [f'{cached:.2f}', f'{cached / live:.2f}', '', '']
            if args.whole:
                own = seconds(step.run, args.steps)
                row[2:] = f'{own:.2f}', f'{own / whole:.2f}'
            size = path.stat().st_size / MIB
            table.add_row(
                *(dtype, f'{size:,.1f}', *row),
                f'{statistics.median(warm):.3f}',
                f'{statistics.median(cold):.3f}',
                f'{size / max(live - cached, 1e-9):,.0f}',
                *(
                    f'{cosine(*pair):.5f}'
                    for pair in zip(found, exact, strict=True)
                ),
            )
            backbone.trunk_cache.folder = None
    Console(width=160).print(table)


if __name__ == '__main__':
    main()
