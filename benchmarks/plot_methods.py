"""Accuracy over peak memory of all tuners on the digits, as one image.

Reads results/cascade_swin_nano_digits.json and upernet_swin_nano_digits.json,
which tools/compare.py wrote, and draws docs/images/methods.png:

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
# File, title, metric, its factor to points and its name.
PANELS = (
    (
        'cascade_swin_nano_digits.json',
        'Detection: Cascade Mask R-CNN',
        ('coco/bbox_mAP', 100, 'box AP'),
    ),
    (
        'upernet_swin_nano_digits.json',
        'Segmentation: UperNet',
        ('mIoU', 1, 'mIoU'),
    ),
)
LABELS = {
    'e3va': 'E3VA',
    'e3va-mix': 'E3VA-Mix',
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
OURS = ('e3va', 'e3va-mix')
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


def draw(axes: Axes, name: str, title: str, metric: tuple) -> None:
    """One point for each tuner, its mean over the seeds of the test split."""
    key, factor, unit = metric
    records = json.loads((RESULTS / name).read_text())
    values: dict[str, list[float]] = {}
    for run in records['runs'].values():
        if 'test' in run:
            values.setdefault(run['method'], []).append(
                factor * run['test'][key]
            )
    for method, points in values.items():
        peak = records['measured'][method]['memory_bytes']['peak'] / 2**20
        mean = statistics.mean(points)
        ours = method in OURS
        axes.errorbar(
            peak,
            mean,
            yerr=statistics.stdev(points),
            fmt='*' if ours else 'o',
            markersize=15 if ours else 6,
            capsize=2,
            elinewidth=0.8,
            color='tab:red' if ours else 'tab:gray',
        )
        axes.annotate(
            LABELS[method],
            (peak, mean),
            xytext=OFFSETS.get(method, (7, 4)),
            textcoords='offset points',
            weight='bold' if ours else 'normal',
            fontsize=9,
        )
    axes.set(
        title=title,
        xlabel='peak memory of a training step, MiB',
        ylabel=f'{unit}, test split',
    )
    axes.margins(y=0.1)
    axes.set_xlim(50, 365)
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw the image of the README."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    for axes, panel in zip(figure.subplots(1, 2), PANELS, strict=True):
        draw(axes, *panel)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=110)
    print(IMAGE)


if __name__ == '__main__':
    main()
