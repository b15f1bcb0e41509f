"""A sweep as a table and as a plot."""

from e3va_mm.sweep.records import SweepRecords


def markdown(records: SweepRecords) -> str:
    """The table of a sweep, the best run first; a dash is not known."""
    metric = records.settings['metric'] or 'last loss'
    rows = [['run', metric, 'at', ''], ['---', '---:', '---:', '---']]
    for name in records.ranked():
        row, best = records.runs[name], records.best(name)
        state = '' if row['done'] else 'not finished'
        if row.get('diverged'):
            state = 'diverged'
        figures = ('-', '-')
        if best is not None:
            figures = f'{best.value:.4g}', str(best.step)
        rows.append([name, *figures, state])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def draw(records: SweepRecords):
    """A matplotlib figure: the metric of each run, or its loss, by step."""
    # Slow to import, and not on a machine that only trains.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for name in records.ranked():
        curve = records.curve(name)
        if curve:
            marker = 'o' if records.settings['metric'] else None
            axes.plot(*zip(*curve, strict=True), marker=marker, label=name)
    metric = records.settings['metric'] or 'loss'
    axes.set(xlabel='step of validation or training', ylabel=metric)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize='small')
    return figure
