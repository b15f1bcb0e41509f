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
# File, title, metric, its factor to points and its name, least value drawn.
PANELS = (
    (
        'retinanet_dinov2_s_bccd.json',
        'Blood cells: RetinaNet, DINOv2-S',
        ('coco/bbox_mAP', 100, 'box AP'),
        42,
    ),
    (
        'fcn_dinov2_s_camvid.json',
        'Street scenes: FCN head, DINOv2-S',
        ('mIoU', 1, 'mIoU'),
        52,
    ),
)
# Longer trainings: of a frozen trunk from features on disk, else live.
LONGER = {
    'retinanet_dinov2_s_bccd.json': 'retinanet_e3va_fusion_dinov2_s_bccd.json',
    'fcn_dinov2_s_camvid.json': 'fcn_e3va_fusion_dinov2_s_camvid.json',
}
DISK, LIVE = 'features on disk', 'as many steps'
LABELS = {
    'e3va': 'E3VA',
    'e3va-mix': 'E3VA-Mix',
    'e3va-fusion': 'E3VA-Fusion',
    'full': 'Full fine-tuning',
    'fixed': 'Frozen',
    'lora': 'LoRA',
    'mona': 'Mona',
    'adapter': 'Adapter',
    'bitfit': 'BitFit',
    'norm': 'Norms',
    'adaptformer': 'AdaptFormer',
    'adatad': 'AdaTAD',
    'dtl': 'DTL',
    'losa': 'LoSA',
    'lst': 'LST',
    'r2-tuning': 'R2-Tuning',
    'res-tuning': 'Res-Tuning',
    'pmt': 'PMT',
    'spatial-prior': 'Spatial prior',
    'vit-split': 'ViT-Split',
}
HIDDEN = ('lora:last=3',)  # as two blocks
OURS = ('e3va', 'e3va-mix', 'e3va-fusion')
# Where a label would hide another point or label: its offset, in points.
OFFSETS = {
    'adatad': (7, -1),
    'dtl': (-28, -5),
    'e3va-fusion': (10, 11),
    'e3va-mix': (9, -15),
    'fixed': (7, -12),
    'full': (-92, 6),
    'lora:last=2': (-69, 5),
    'lora:last=4': (7, 1),
    'lora:last=8': (-42, 20),
    'losa': (-8, -14),
    'lst': (7, -8),
    'pmt': (7, -11),
    'res-tuning': (7, -4),
    'vit-split': (7, -10),
}


def draw(
    axes: Axes,
    name: str,
    title: str,
    metric: tuple,
    least: float,
) -> None:
    """One point for each tuner, its mean over the seeds of its best rate.

    Variants of E3VA-Fusion in rank are left out, and ``HIDDEN``.
    """
    key, factor, unit = metric
    measured = json.loads((RESULTS / name).read_text())['measured']
    values = accuracies(name, key, factor)
    for method, points in accuracies(LONGER[name], key, factor).items():
        beside = method == 'fixed' or method.startswith(OURS)
        values[f'{method}:{DISK if beside else LIVE}'] = points
    below = []
    for method, points in values.items():
        mean = statistics.mean(points)
        kind, *options = method.split(':')
        if method in HIDDEN or any(o.startswith('rank=') for o in options):
            continue
        step = measured.get(method) or measured[method.rpartition(':')[0]]
        peak = step['memory_bytes']['peak'] / 2**20
        if mean < least:
            below.append(f'{LABELS[kind]} {mean:.1f}')
            continue
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
            xytext=OFFSETS.get(method, OFFSETS.get(kind, (7, 4))),
            textcoords='offset points',
            weight='bold' if ours else 'normal',
            fontsize=9,
        )
    axes.set(
        title=title,
        xlabel='peak memory of a training step, MiB',
        ylabel=f'{unit}, validation split',
    )
    if below:
        text = f'not drawn: {", ".join(below)}'
        axes.text(0.98, 0.03, text, transform=axes.transAxes, ha='right')
    axes.margins(y=0.1)
    axes.set_xlim(60, 620)
    axes.set_ylim(bottom=least)
    axes.grid(alpha=0.3)


def accuracies(name: str, key: str, factor: float) -> dict[str, list[float]]:
    """Points of each tuner of a file, one for each seed of its best rate."""
    runs = json.loads((RESULTS / name).read_text())['runs'].values()
    best: dict[str, dict] = {}
    for run in runs:
        value = run['validation'][key]
        known = best.get(run['method'])
        if not run['seed'] and (
            known is None or value > known['validation'][key]
        ):
            best[run['method']] = run
    return {
        method: [
            factor * run['validation'][key]
            for run in runs
            if (run['method'], run['lr']) == (method, chosen['lr'])
        ]
        for method, chosen in best.items()
    }


def readable(option: str) -> str:
    """``'save_taps=int8'`` as ``'(int8)'``, others as they are."""
    name, _, value = option.partition('=')
    return f'({value if name == "save_taps" else option.replace("=", " ")})'


def main() -> None:
    """Draw the image of the README."""
    figure = Figure(figsize=(13, 4.8), layout='constrained')
    panels = figure.subplots(1, len(PANELS))
    for axes, panel in zip(panels, PANELS, strict=True):
        draw(axes, *panel)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=95)
    print(IMAGE)


if __name__ == '__main__':
    main()
