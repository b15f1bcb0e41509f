"""A comparison as a table and as plots."""

import math
import statistics
from collections.abc import Mapping, Sequence

from e3va_mm.comparison.methods import is_side_path
from e3va_mm.comparison.records import Records
from e3va_mm.measure.report import COLUMNS, median_seconds, peak_bytes
from e3va_mm.utils.sizes import MIB

# Metrics of the frameworks -> heading, and the factor to points of 100.
HEADINGS = {
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
    'pascal_voc/mAP': ('mAP', 100),
    'mIoU': ('mIoU', 1),
}
COSTS = ('memory', 'time')
MEASURED = (
    *('trainable in backbone', 'of the backbone', 'peak MiB', 'held MiB'),
    *('s/step', 'file MB'),
)


def heading(metric: str) -> str:
    """A metric in a table."""
    return HEADINGS.get(metric, (metric, 1))[0]


def points(records: Records, method: str, split: str, metric: str) -> list:
    """Values of the chosen runs of a method, in points of 100."""
    factor = HEADINGS.get(metric, (metric, 1))[1]
    return [v * factor for v in records.values(method, split, metric)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation; the latter is 0 of one value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread


def markdown(records: Records, metrics: Sequence[str], split: str) -> str:
    """The table of a comparison; a dash stands for what is not known."""
    heads = ['method', *map(heading, metrics), 'learning rate', *MEASURED]
    rows = [heads, ['---', *['---:'] * (len(heads) - 1)]]
    for method in records.methods:
        chosen = records.chosen(method)
        row = records.measured.get(method, {})
        cells = [
            *(_spread(points(records, method, split, m)) for m in metrics),
            f'{chosen[0].lr:g}' if chosen else '',
            *(COLUMNS[name](row) for name in MEASURED),
        ]
        rows.append([method, *(cell or '-' for cell in cells)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _spread(values: Sequence[float]) -> str:
    each = ', '.join(
        'diverged' if math.isnan(value) else f'{value:.1f}' for value in values
    )
    if len(values) < 2 or any(map(math.isnan, values)):
        return each
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.2f} ± {deviation:.2f} ({each})'


def draw(records: Records, metric: str, split: str, cost: str):
    """A matplotlib figure of accuracy over one of ``COSTS``."""
    # Slow to import, and not on a machine that only trains.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for method in records.methods:
        values = points(records, method, split, metric)
        x = _cost(records.measured.get(method, {}), cost)
        if not values or any(map(math.isnan, values)) or x is None:
            continue
        mean, deviation = mean_and_deviation(values)
        ours = is_side_path(method)
        axes.errorbar(
            x,
            mean,
            yerr=deviation,
            fmt='*' if ours else 'o',
            markersize=13 if ours else 7,
            capsize=3,
            color='tab:red' if ours else 'tab:gray',
        )
        axes.annotate(
            method,
            (x, mean),
            # Ours above, baselines below: a point beside hides neither.
            xytext=(7, 7 if ours else -13),
            textcoords='offset points',
            weight='bold' if ours else 'normal',
        )
    label = 'seconds per training step'
    if cost == 'memory':
        label = 'accounted peak of a training step, MiB'
    axes.set(xlabel=label, ylabel=f'{heading(metric)}, {split} split')
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    return figure


def _cost(row: Mapping, cost: str) -> float | None:
    if cost == 'time':
        return median_seconds(row)
    return peak_bytes(row) and peak_bytes(row) / MIB
