"""The figures of measured steps as tables, advice and a plot."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from e3va_mm.measure.batches import Batch
from e3va_mm.measure.fits import Change
from e3va_mm.measure.gpu_model import LAUNCHES
from e3va_mm.measure.kept import kept_by_part
from e3va_mm.measure.live_bytes import CATEGORIES
from e3va_mm.measure.results import Rows, groups
from e3va_mm.utils.sizes import GIB, MIB


def mib(size: int | None) -> str:
    """Bytes in MiB, for a table."""
    return '' if size is None else f'{size / MIB:,.1f}'


def peak_bytes(row: Mapping) -> int | None:
    """Accounted peak of a row, if it was measured."""
    return row.get('memory_bytes', {}).get('peak')


def median_seconds(row: Mapping) -> float | None:
    """Median of the timed steps of a row, if there are any."""
    return statistics.median(row['seconds']) if row.get('seconds') else None


def _count(key: str) -> Callable[[Mapping], str]:
    return lambda row: (
        f'{row["parameters"][key]:,}' if 'parameters' in row else ''
    )


def _memory(key: str) -> Callable[[Mapping], str]:
    return lambda row: mib(row.get('memory_bytes', {}).get(key))


def _share(row: Mapping) -> str:
    parameters = row.get('parameters', {})
    if not parameters.get('backbone'):
        return ''
    share = parameters['trainable_backbone'] / parameters['backbone']
    return f'{100 * share:.2f} %'


def _held(row: Mapping) -> str:
    sizes = row.get('memory_bytes', {}).get('kept_modules')
    return mib(sizes and kept_by_part(sizes).get('backbone', 0))


def _spread(row: Mapping) -> str:
    times = row.get('seconds')
    if not times:
        return ''
    return f'{median_seconds(row):.3f} ({min(times):.3f}-{max(times):.3f})'


def _file(row: Mapping) -> str:
    size = row.get('file_bytes')
    return '' if size is None else f'{size / 1e6:.2f}'


# What a column has in it for a row, '' where that is not known.
COLUMNS: Mapping[str, Callable[[Mapping], str]] = {
    'trainable': _count('trainable'),
    'trainable in backbone': _count('trainable_backbone'),
    'of the backbone': _share,
    'peak MiB': _memory('peak'),
    **{key: _memory(key) for key in (*CATEGORIES, 'allocated', 'reserved')},
    'held MiB': _held,
    's/step': lambda row: _spread(row).split(' ')[0],
    's/step (min-max)': _spread,
    'file MB': _file,
}
FIGURES = (
    *('trainable', 'of the backbone', 'peak MiB', *CATEGORIES),
    *('allocated', 'reserved', 's/step (min-max)'),
)


def figures_table(rows: Rows, title: str) -> Table:
    """The figures of all rows; ratios where there is more than one."""
    columns = {
        name: [COLUMNS[name](row) for row in rows.values()] for name in FIGURES
    }
    if len(rows) > 1:
        base_of = {k: base for base, group in groups(rows) for k in group}
        names = set(base_of.values())
        # Each config may have a reference of its own, of the same variant.
        name = next(iter(base_of.values()))
        if len(names) > 1:
            name = rows[name]['variant']
        for what, value in dict(peak=peak_bytes, time=median_seconds).items():
            columns[f'{what} / {name}'] = [
                f'{value(row) / value(rows[base_of[label]]):.3f}'
                if value(row) and value(rows[base_of[label]])
                else ''
                for label, row in rows.items()
            ]
    return _table(title, rows, columns)


def _table(
    title: str, labels: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> Table:
    """A table of the columns that have something in them."""
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(title=title)
    table.add_column('')
    for name in columns:
        table.add_column(name, justify='right')
    for label, *cells in zip(labels, *columns.values(), strict=True):
        table.add_row(label, *cells)
    return table


def modules_table(rows: Rows) -> Table:
    """MiB kept for backward by each part of the models, largest first."""
    kept = {
        label: kept_by_part(row['memory_bytes']['kept_modules'])
        for label, row in rows.items()
    }
    parts = dict.fromkeys(part for sizes in kept.values() for part in sizes)
    columns = {
        label: [
            *(mib(sizes.get(part, 0)) for part in parts),
            mib(sum(sizes.values())),
        ]
        for label, sizes in kept.items()
    }
    labels = [*(part or '(model)' for part in parts), 'sum']
    return _table('MiB kept for backward, by module', labels, columns)


def gpu_table(rows: Rows, cards: Sequence[str]) -> Table:
    """Modelled milliseconds of steps on cards, beside measured seconds."""
    columns: dict[str, list[str]] = {}
    for row in rows.values():
        parts = row['gpu_model'].values()
        host = sum(part['host'] for part in parts)
        cells = {'measured s/step': _spread(row).split(' ')[0]}
        for key in ('ops', 'kernels'):
            cells[key] = f'{sum(part[key] for part in parts):,}'
        cells['host ms'] = _ms(host)
        for card in cards:
            gpu = sum(sum(part['cards'][card].values()) for part in parts)
            cells[f'{card} GPU ms'] = _ms(gpu)
            cells[f'{card} step ms'] = _ms(max(host, gpu))
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    title = 'A model, not measured: one training step on GPUs'
    return _table(title, list(rows), columns)


def gpu_parts_table(label: str, row: Mapping, cards: Sequence[str]) -> Table:
    """What bounds the parts of a modelled step on each card."""
    parts = row['gpu_model']
    columns = {
        'ops': [f'{part["ops"]:,}' for part in parts.values()],
        'kernels': [f'{part["kernels"]:,}' for part in parts.values()],
        'host ms': [_ms(part['host']) for part in parts.values()],
    }
    for card in cards:
        for part in parts.values():
            seconds = part['cards'][card]
            gpu = sum(seconds.values())
            bound = max(seconds, key=seconds.get)
            if part['host'] > gpu:
                bound = LAUNCHES
            cell = f'{_ms(gpu)}, {bound}'
            columns.setdefault(f'{card} GPU ms, bound by', []).append(cell)
    return _table(f'A model, not measured: {label}', list(parts), columns)


def _ms(seconds: float) -> str:
    return f'{1e3 * seconds:,.1f}'


def fits_table(needed: Mapping[str, int], sizes: Sequence[float]) -> Table:
    """Which cards, by GiB, hold a step that needs some bytes."""
    columns = {'needs MiB': [mib(size) for size in needed.values()]}
    for size in sizes:
        columns[f'{size:g} GB'] = [
            'yes' if need <= size * GIB else 'no' for need in needed.values()
        ]
    return _table('Cards that hold the step', list(needed), columns)


def batch_text(card: float, batch: Batch) -> str:
    """The largest batch for a card, with the lines to paste."""
    height, width = batch.size
    return (
        f'# {card:g} GB: {batch.images} images of {height}x{width} need '
        f'{mib(batch.needs)} MiB\n'
        f'train_dataloader = dict(batch_size={batch.images})\n'
        f'optim_wrapper = dict(accumulative_counts={batch.counts})'
    )


def advice(label: str, changes: Sequence[Change]) -> str:
    """Changes of a config as text, with lines to paste."""
    lines = [
        f'{label} does not fit all cards. What to change in a config with '
        'this one as its _base_, by the MiB it works on:'
    ]
    for change in changes:
        lines.append(f'# {mib(change.addresses)} {change.reason}')
        lines.append(change.lines)
    return '\n'.join(lines if changes else [*lines, 'Nothing known.'])


def draw(rows: Rows, title: str):
    """A matplotlib figure of peaks by category and seconds per step."""
    from matplotlib.figure import Figure

    values = rows.values()
    panels = dict(memory_bytes=_draw_memory, seconds=_draw_seconds)
    panels = [
        draw_panel
        for key, draw_panel in panels.items()
        if all(row.get(key) for row in values)
    ]
    figure = Figure(figsize=(11, 1.8 + 0.4 * len(rows)), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for draw_panel, axis in zip(panels, axes, strict=True):
        draw_panel(axis, rows)
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
    medians = [median_seconds(row) for row in rows.values()]
    times = [(min(r['seconds']), max(r['seconds'])) for r in rows.values()]
    spread = [
        [m - low for m, (low, _) in zip(medians, times, strict=True)],
        [high - m for m, (_, high) in zip(medians, times, strict=True)],
    ]
    axis.barh(list(rows), medians, xerr=spread, color='tab:gray', capsize=3)
    axis.set_xlabel('seconds per step, median (min-max)')
