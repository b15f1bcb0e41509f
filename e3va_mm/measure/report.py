"""The figures of measured steps as tables, advice and a picture.

What rows are, :mod:`~e3va_mm.measure.results` says.
"""

import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from e3va_mm.measure.fits import MIB, Verdict, kept_by_part
from e3va_mm.measure.live_bytes import CATEGORIES
from e3va_mm.measure.results import Rows, references

# What torch's allocator says, on CUDA.
ALLOCATOR = ('allocated', 'reserved')


def figures_table(rows: Rows, title: str) -> Table:
    """The figures of all rows; ratios where there is more than one.

    Args:
        rows (Rows): What was measured; what no row has takes no column.
        title (str): Stands above the table.

    Returns:
        Table: For rich.
    """
    columns = _columns(rows)
    table = Table(title=title)
    table.add_column('')
    for name in columns:
        table.add_column(name, justify='right')
    for i, label in enumerate(rows):
        table.add_row(label, *(values[i] for values in columns.values()))
    return table


def _columns(rows: Rows) -> dict[str, list[str]]:
    """Heading to the texts of all rows."""
    parameters = {k: r['parameters'] for k, r in rows.items()}
    columns = {
        'trainable': [f'{p["trainable"]:,}' for p in parameters.values()],
        'of backbone': [
            f'{100 * p["trainable_backbone"] / p["backbone"]:.2f} %'
            if p['backbone']
            else ''
            for p in parameters.values()
        ],
    }
    memory = {k: r.get('memory_bytes', {}) for k, r in rows.items()}
    for key in ('peak', *CATEGORIES, *ALLOCATOR):
        values = [_mib(figures.get(key)) for figures in memory.values()]
        if any(values):
            columns['peak MiB' if key == 'peak' else key] = values
    seconds = {k: r.get('seconds') for k, r in rows.items()}
    if any(seconds.values()):
        columns['s/step (min-max)'] = [
            _spread(times) for times in seconds.values()
        ]
    if len(rows) > 1:
        peaks = {k: figures.get('peak') for k, figures in memory.items()}
        medians = {k: t and statistics.median(t) for k, t in seconds.items()}
        columns |= _ratios('peak', peaks, rows)
        columns |= _ratios('time', medians, rows)
    return columns


def _ratios(what: str, values: Mapping, rows: Rows) -> dict[str, list[str]]:
    """Each row's value over that of its reference, as one column."""
    base = references(rows)
    texts = [
        f'{values[k] / values[base[k]]:.3f}'
        if values[k] and values[base[k]]
        else ''
        for k in rows
    ]
    names = {rows[label]['variant'] for label in base.values()}
    single = set(base.values())
    name = single.pop() if len(single) == 1 else names.pop()
    return {f'{what} / {name}': texts} if any(texts) else {}


def _mib(size: int | None) -> str:
    return '' if size is None else f'{size / MIB:,.1f}'


def _spread(times: Sequence[float] | None) -> str:
    if not times:
        return ''
    median = statistics.median(times)
    return f'{median:.3f} ({min(times):.3f}-{max(times):.3f})'


def modules_table(rows: Rows) -> Table:
    """MiB kept for backward by each part of the models, largest first.

    Args:
        rows (Rows): What was measured; all have ``memory_bytes``.

    Returns:
        Table: One column a row; the parts in the order of the first.
    """
    parts = {
        label: kept_by_part(row['memory_bytes']['kept_modules'])
        for label, row in rows.items()
    }
    table = Table(title='MiB kept for backward, by module')
    table.add_column('')
    for label in rows:
        table.add_column(label, justify='right')
    for name in dict.fromkeys(n for found in parts.values() for n in found):
        table.add_row(
            name or '(model)', *(_mib(p.get(name, 0)) for p in parts.values())
        )
    table.add_section()
    table.add_row('sum', *(_mib(sum(p.values())) for p in parts.values()))
    return table


def fits_table(verdicts: Mapping[str, Sequence[Verdict]]) -> Table:
    """Which cards hold the step of each row.

    Args:
        verdicts (Mapping[str, Sequence[Verdict]]): Label to those of
            :func:`~e3va_mm.measure.fits`, the same sizes in each.

    Returns:
        Table: With a column of the bytes needed, and one for each size.
    """
    table = Table(title='Cards that hold the step')
    table.add_column('')
    table.add_column('needs MiB', justify='right')
    for verdict in next(iter(verdicts.values())):
        table.add_column(f'{verdict.size:g} GB', justify='right')
    for label, found in verdicts.items():
        holds = ('yes' if verdict.holds else 'no' for verdict in found)
        table.add_row(label, _mib(found[0].needed), *holds)
    return table


def advice(label: str, verdicts: Sequence[Verdict]) -> str:
    """What to change for the cards that do not hold a step.

    Args:
        label (str): Of the row.
        verdicts (Sequence[Verdict]): Of the row.

    Returns:
        str: Plain text, with lines to paste; empty if all cards hold it.
    """
    sizes: dict[str, list[str]] = {}
    changes = {}
    for verdict in verdicts:
        for change in verdict.changes:
            changes[change.lines] = change
            sizes.setdefault(change.lines, []).append(f'{verdict.size:g}')
    short = [f'{v.size:g}' for v in verdicts if not v.holds]
    if not short:
        return ''
    lines = [
        f'{label} does not fit {", ".join(short)} GB. What to change in a '
        'config with this one as its _base_, by the MiB it works on:'
    ]
    for key in sorted(changes, key=lambda k: -changes[k].addresses):
        change = changes[key]
        cards = '' if sizes[key] == short else f' [{", ".join(sizes[key])} GB]'
        lines.append(f'# {_mib(change.addresses)} {change.reason}{cards}')
        lines.append(key)
    if not changes:
        lines.append('Nothing that this tool knows of.')
    return '\n'.join(lines)


def draw(rows: Rows, title: str):
    """Draw peaks by category and seconds a step beside each other.

    Args:
        rows (Rows): What was measured.
        title (str): Stands above the picture.

    Returns:
        matplotlib.figure.Figure: One panel for each that was measured.
    """
    from matplotlib.figure import Figure

    panels = [
        panel
        for key, panel in (
            ('memory_bytes', _draw_memory),
            ('seconds', _draw_seconds),
        )
        if all(row.get(key) for row in rows.values())
    ]
    figure = Figure(figsize=(11, 1.8 + 0.4 * len(rows)), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, rows)
        axis.grid(axis='x', alpha=0.3)
        axis.set_axisbelow(True)
    # The first row on top, as in the table; the axes share it.
    axes[0].invert_yaxis()
    return figure


def _draw_memory(axis, rows: Rows) -> None:
    left = [0.0] * len(rows)
    for key in CATEGORIES:
        sizes = [row['memory_bytes'][key] / MIB for row in rows.values()]
        axis.barh(list(rows), sizes, left=left, label=key)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.set_xlabel('accounted peak, MiB')
    axis.legend(fontsize=8, ncols=3, loc='lower left', bbox_to_anchor=(0, 1))


def _draw_seconds(axis, rows: Rows) -> None:
    times = [row['seconds'] for row in rows.values()]
    medians = [statistics.median(taken) for taken in times]
    spread = [
        [m - min(t) for m, t in zip(medians, times, strict=True)],
        [max(t) - m for m, t in zip(medians, times, strict=True)],
    ]
    axis.barh(list(rows), medians, xerr=spread, color='tab:gray', capsize=3)
    axis.set_xlabel('seconds a step, median (min-max)')
