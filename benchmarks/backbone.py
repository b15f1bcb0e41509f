"""The backbone alone: bytes kept for backward, and seconds of a step.

    python benchmarks/backbone.py --backbone swin-l --size 512 512
    python benchmarks/backbone.py --backbone dinov2-b --size 518 518

Bytes kept are live storages after the forward pass minus before
it, the outputs gone, under a loss that keeps nothing; relative to full
fine-tuning of the stock backbone. Seconds are forward and backward, relative
to the forward pass of the stock backbone, frozen; all in fp32 but for what an
option says. Variants take turns, so that a machine's changing speed falls on
all alike.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure import kept_for_backward
from e3va_mm.registry import MODELS, install
from e3va_mm.utils import mark_trainable

STOCK_CLASSES = {
    'E3VASwinTransformer': 'mmdet.SwinTransformer',
    'E3VAVisionTransformer': 'mmpretrain.VisionTransformer',
}
DINOV2 = dict(
    type='E3VAVisionTransformer',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_type='featmap',
)
BACKBONES = {
    **{
        f'swin-{size}': dict(
            type='E3VASwinTransformer',
            embed_dims=embed_dims,
            depths=(2, 2, middle, 2),
            num_heads=[embed_dims // 32 * 2**stage for stage in range(4)],
        )
        for size, embed_dims, middle in (
            ('t', 96, 6),
            ('s', 96, 18),
            ('b', 128, 18),
            ('l', 192, 18),
        )
    },
    'dinov2-b': dict(DINOV2, arch='base', out_indices=[2, 5, 8, 11]),
    'dinov2-l': dict(DINOV2, arch='large', out_indices=[5, 11, 17, 23]),
}
SIDE_PATHS = {
    'exact': dict(preset='exact'),
    'bf16': dict(save_taps='bf16'),
    'int8': dict(save_taps='int8'),
    'int4': dict(save_taps='int4'),
    'recompute': dict(save_taps='recompute'),
    'lean': dict(preset='lean'),
    'frozen-same': dict(
        type='e3va_mm.NoSidePath', preset='exact', train_output_norms=False
    ),
    'frozen-lean': dict(
        type='e3va_mm.NoSidePath', preset='lean', train_output_norms=False
    ),
}
STOCK = ('frozen', 'full')
ALL = (*STOCK, *SIDE_PATHS)


def build(variant: str, name: str) -> nn.Module:
    """A backbone of random weights, ready to train."""
    torch.manual_seed(0)
    config = copy.deepcopy(BACKBONES[name])
    ours = config.pop('type')
    if variant in SIDE_PATHS:
        kind = dict(
            type=f'e3va_mm.{ours}',
            allow_random_trunk=True,
            tuner=SIDE_PATHS[variant],
        )
    else:
        kind = dict(type=STOCK_CLASSES[ours], drop_path_rate=0.0)
    backbone = MODELS.build({**kind, **config})
    backbone.init_weights()
    backbone.train()
    if variant == 'frozen':
        mark_trainable(backbone, [])
        backbone.eval()
    return backbone


def step(backbone: nn.Module, image: Tensor) -> None:
    """Forward, and backward if anything trains."""
    outputs = backbone(image)
    if outputs[0].requires_grad:
        torch.autograd.backward(
            outputs, [torch.full_like(o, 1e-3) for o in outputs]
        )


def kept_bytes(
    name: str, image: Tensor, variants: Sequence[str]
) -> dict[str, int]:
    """Bytes kept for backward, by all variants and by 'full'."""
    return {
        variant: kept_for_backward(build(variant, name), image)
        for variant in progress(sorted({'full', *variants}), 'bytes')
    }


def seconds(
    name: str,
    image: Tensor,
    variants: Sequence[str],
    steps: int,
    warmup: int,
) -> dict[str, list[float]]:
    """Seconds of each step of each variant, in turns."""
    # 'frozen' is what the others are relative to.
    backbones = {
        v: build(v, name) for v in dict.fromkeys(['frozen', *variants])
    }
    taken: dict[str, list[float]] = {variant: [] for variant in backbones}
    for turn in progress(range(warmup + steps), 'seconds'):
        for variant, backbone in backbones.items():
            start = time.perf_counter()
            step(backbone, image)
            if image.is_cuda:
                torch.cuda.synchronize()
            if turn >= warmup:
                taken[variant].append(time.perf_counter() - start)
            for parameter in backbone.parameters():
                parameter.grad = None
    return taken


def progress(items, what: str):
    """A bar on stderr that goes away."""
    return track(items, what, console=Console(stderr=True), transient=True)


def table(kept: dict, taken: dict, title: str) -> Table:
    """The figures as people read them."""
    made = Table(title=title)
    for column in (
        'variant',
        'kept MiB',
        '/ full',
        's/step',
        'min-max',
        '/ frozen',
    ):
        made.add_column(
            column, justify='left' if column == 'variant' else 'right'
        )
    for variant in dict.fromkeys([*taken, *kept]):
        share = speed = []
        if variant in kept:
            share = [
                f'{kept[variant] / 2**20:,.1f}',
                f'{kept[variant] / kept["full"]:.1%}',
            ]
        if variant in taken:
            times = taken[variant]
            median = statistics.median(times)
            speed = [
                f'{median:.3f}',
                f'{min(times):.3f}-{max(times):.3f}',
                f'{median / statistics.median(taken["frozen"]):.2f}',
            ]
        made.add_row(variant, *(share or ['-'] * 2), *(speed or ['-'] * 3))
    return made


def main() -> None:
    """Measure bytes, then seconds; print the table and write the JSON."""
    install()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--backbone', choices=BACKBONES, default='swin-l')
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=ALL,
        default=ALL,
        metavar='NAME',
        help=f'some of {", ".join(ALL)}; default: all',
    )
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--steps', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--bytes-only', action='store_true', help='run no timed steps'
    )
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')
    torch.set_default_device(args.device)
    image = torch.randn(args.batch, 3, *args.size)
    with DefaultScope.overwrite_default_scope('mmdet'):
        kept = kept_bytes(args.backbone, image, args.variants)
        taken = {}
        if not args.bytes_only:
            taken = seconds(
                args.backbone, image, args.variants, args.steps, args.warmup
            )
    height, width = args.size
    title = f'{args.backbone} {args.batch}x{height}x{width}'
    Console(width=100).print(table(kept, taken, title))
    print(
        f'torch {torch.__version__}, {args.device}, '
        f'{torch.get_num_threads()} threads'
        + f'; median of {args.steps} steps after {args.warmup}'
        * bool(taken)
    )
    if args.json:
        args.json.write_text(json.dumps(dict(kept=kept, seconds=taken)))


if __name__ == '__main__':
    keep_freed_memory()
    main()
