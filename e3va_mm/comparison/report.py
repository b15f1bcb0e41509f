"""A comparison as a table and as pictures."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from e3va_mm.comparison.methods import SIDE_PATHS
from e3va_mm.comparison.records import Records, mean_and_deviation
from e3va_mm.measure.fits import MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metrics of the frameworks -> heading, and the factor to points of 100.
HEADINGS = {
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
    'mIoU': ('mIoU', 1),
}
COSTS = {
    'memory': 'accounted peak of a training step, MiB',
    'time': 'seconds of a training step',
}


def points(values: Sequence[float], metric: str) -> list[float]:
    """Values of a metric in points of 100."""
    return [value * HEADINGS.get(metric, (metric, 1))[1] for value in values]


def markdown(records: Records, metrics: Sequence[str], split: str) -> str:
    """The table of a comparison.

    Args:
        records (Records): What was found.
        metrics (Sequence[str]): Those of the first columns.
        split (str): ``'test'`` or ``'validation'``.

    Returns:
        str: A Markdown table; a dash stands for what is not known.
    """
    headings = [HEADINGS.get(metric, (metric, 1))[0] for metric in metrics]
    rows = [
        [
            'method',
            *headings,
            'learning rate',
            'trainable',
            'of the backbone',
            'peak MiB',
            'held MiB',
            's/step',
            'file MB',
        ]
    ]
    rows.append(['---', *['---:'] * (len(rows[0]) - 1)])
    for method in records.methods:
        chosen = records.chosen(method)
        rows.append(
            [
                method,
                *(
                    _spread(
                        points(records.values(method, split, metric), metric)
                    )
                    for metric in metrics
                ),
                f'{chosen[0].lr:g}' if chosen else '-',
                *_costs(records.measured.get(method, {})),
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return '-'
    each = ', '.join(
        'diverged' if math.isnan(value) else f'{value:.1f}' for value in values
    )
    if len(values) == 1 or any(map(math.isnan, values)):
        return each
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.2f} ± {deviation:.2f} ({each})'


def _costs(row: dict) -> list[str]:
    parameters, memory = row.get('parameters'), row.get('memory_bytes')
    cells = ['-', '-', '-', '-', '-', '-']
    if parameters:
        trained, whole = (
            parameters['trainable_backbone'],
            parameters['backbone'],
        )
        cells[0] = f'{trained:,}'
        cells[1] = f'{100 * trained / whole:.2f} %'
    if memory:
        cells[2] = f'{memory["peak"] / MIB:,.1f}'
        cells[3] = f'{held_by_backbone(memory) / MIB:,.1f}'
    if row.get('seconds'):
        cells[4] = f'{statistics.median(row["seconds"]):.3f}'
    if 'file_bytes' in row:
        cells[5] = f'{row["file_bytes"] / 1e6:.2f}'
    return cells


def held_by_backbone(memory: dict) -> int:
    """Bytes that a backbone holds when backward begins, outputs included."""
    return sum(
        size
        for path, size in memory['kept_modules'].items()
        if path.split('.')[0] == 'backbone'
    )


def draw(records: Records, metric: str, split: str, cost: str) -> 'Figure':
    """Accuracy against a cost.

    Args:
        records (Records): What was found.
        metric (str): The accuracy.
        split (str): ``'test'`` or ``'validation'``.
        cost (str): A key of ``COSTS``.

    Returns:
        Figure: A point with its deviation for each method that has both.
    """
    # Slow to import, and not on a machine that only trains.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for method in records.methods:
        values = points(records.values(method, split, metric), metric)
        x = _cost(records.measured.get(method, {}), cost)
        if not values or any(map(math.isnan, values)) or x is None:
            continue
        mean, deviation = mean_and_deviation(values)
        ours = method in SIDE_PATHS
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
            # Ours above, rivals below: a point beside hides neither.
            xytext=(7, 7 if ours else -13),
            textcoords='offset points',
            weight='bold' if ours else 'normal',
        )
    heading = HEADINGS.get(metric, (metric, 1))[0]
    axes.set(xlabel=COSTS[cost], ylabel=f'{heading}, {split} split')
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    return figure


def _cost(row: dict, cost: str) -> float | None:
    if cost == 'memory' and row.get('memory_bytes'):
        return row['memory_bytes']['peak'] / MIB
    if cost == 'time' and row.get('seconds'):
        return statistics.median(row['seconds'])
    return None
