"""Accuracy over peak memory of all tuners, as one image.

Reads the figures of `PANELS` in results/, which tools/compare.py wrote, and
draws docs/images/methods.png:

    python benchmarks/plot_methods.py
"""

import json
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
IMAGE = ROOT / 'docs' / 'images' / 'methods.png'
# File, title, split, metric, its factor to points and its name, range of MiB.
PANELS = (
    (
        'retinanet_dinov2_s_bccd.json',
        'Blood cells: RetinaNet, DINOv2-S',
        'validation',
        ('coco/bbox_mAP', 100, 'box AP'),
        (0, 760),
    ),
    (
        'cascade_swin_nano_digits.json',
        'Digits: Cascade Mask R-CNN, nano Swin',
        'test',
        ('coco/bbox_mAP', 100, 'box AP'),
        (50, 365),
    ),
    (
        'upernet_swin_nano_digits.json',
        'Digits: UperNet, nano Swin',
        'test',
        ('mIoU', 1, 'mIoU'),
        (50, 365),
    ),
)
LABELS = {
    'e3va': 'E3VA',
    'e3va-mix': 'E3VA-Mix',
    'e3va-fusion': 'E3VA-Fusion',
    'full': 'Full fine-tuning',
    'fixed': 'Frozen',
    'bitfit': 'BitFit',
    'norm': 'Norms',
    'partial1': 'Last block',
    'adapter': 'Adapter',
    'lora': 'LoRA',
    'adaptformer': 'AdaptFormer',
    'lorand': 'LoRand',
    'mona': 'Mona',
}
OURS = ('e3va', 'e3va-mix', 'e3va-fusion')
# Where a label would hide another point or label: its offset, in points.
OFFSETS = {
    'adapter': (7, -5),
    'adaptformer': (7, -3),
    'bitfit': (-8, -14),
    'e3va': (9, 5),
    'fixed': (-46, -4),
    'lorand': (7, -10),
    'norm': (-8, 8),
    'partial1': (3, -16),
}


def draw(
    axes: Axes,
    name: str,
    title: str,
    split: str,
    metric: tuple,
    memory: tuple[int, int],
) -> None:
    """One point for each tuner, its mean over the seeds of its best rate."""
    key, factor, unit = metric
    records = json.loads((RESULTS / name).read_text())
    runs = records['runs'].values()
    best: dict[str, dict] = {}
    for run in runs:
        value = run['validation'][key]
        known = best.get(run['method'])
        if not run['seed'] and (
            known is None or value > known['validation'][key]
        ):
            best[run['method']] = run
    values = {
        method: [
            factor * run[split][key]
            for run in runs
            if split in run
            and (run['method'], run['lr']) == (method, chosen['lr'])
        ]
        for method, chosen in best.items()
    }
    for method, points in values.items():
        peak = records['measured'][method]['memory_bytes']['peak'] / 2**20
        mean = statistics.mean(points)
        kind, *options = method.split(':')
        ours = kind in OURS
        axes.errorbar(
            peak,
            mean,
            yerr=statistics.stdev(points) if len(points) > 1 else None,
            fmt='*' if ours else 'o',
            markersize=15 if ours else 6,
            capsize=2,
            elinewidth=0.8,
            color='tab:red' if ours else 'tab:gray',
        )
        axes.annotate(
            ' '.join([LABELS[kind], *map(readable, options)]),
            (peak, mean),
            xytext=OFFSETS.get(kind, (7, 4)),
            textcoords='offset points',
            weight='bold' if ours else 'normal',
            fontsize=9,
        )
    axes.set(
        title=title,
        xlabel='peak memory of a training step, MiB',
        ylabel=f'{unit}, {split} split',
    )
    axes.margins(y=0.1)
    axes.set_xlim(*memory)
    axes.grid(alpha=0.3)


def readable(option: str) -> str:
    """``'save_taps=int8'`` as ``'(int8)'``."""
    name, _, value = option.partition('=')
    return f'({value})' if name == 'save_taps' else f'({name} {value})'


def main() -> None:
    """Draw the image of the README."""
    figure = Figure(figsize=(14, 4.2), layout='constrained')
    panels = figure.subplots(1, len(PANELS))
    for axes, panel in zip(panels, PANELS, strict=True):
        draw(axes, *panel)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=95)
    print(IMAGE)


if __name__ == '__main__':
    main()
