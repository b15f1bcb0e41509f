"""The report: `python -m e3va_mm.doctor`."""

import sys

from e3va_mm.doctor.checks import diagnose
from e3va_mm.doctor.snapshot import DISTRIBUTIONS, OTHERS, Snapshot, look

#: What the test suite runs with: the maintained line, the dormant originals.
TESTED = {
    'Python': ('3.11', '3.10'),
    'torch': ('2.13.0', '2.1.2'),
    'mmengine': ('0.10.12', '0.10.7'),
    'mmcv': ('2.3.6', '2.1.0'),
    'mmdet': ('3.5.1', '3.3.0'),
    'mmseg': ('1.4.2', '1.2.2'),
}


def rows(seen: Snapshot) -> list[tuple[str, str, str]]:
    """Write the table: what, as it is installed, as it was tested."""
    line = next(iter(seen.of('mmengine')), '') in seen.originals
    tested = {name: pair[line] for name, pair in TESTED.items()}
    table = [('Python', seen.python, tested['Python'])]
    for package in {**OTHERS, **DISTRIBUTIONS}:
        found = ', '.join(f'{n} {v}' for n, v in seen.of(package).items())
        if package == 'torch' and found:
            cuda = f'CUDA {seen.torch_cuda}' if seen.torch_cuda else 'CPU'
            found += f', {cuda}'
        table.append((package, found or '-', tested.get(package, '')))
    archs = ' '.join(seen.ops_archs) or 'CPU'
    table.append(('ops of mmcv', archs if seen.ops else '-', ''))
    for name, device in seen.devices.items():
        table.append(('GPU', f'{name}, {device}', ''))
    if not seen.devices:
        table.append(('GPU', 'none that torch sees', ''))
    return table


def _print_table(table: list[tuple[str, str, str]]) -> None:
    """Print a table with rich, or plainly where rich is missing."""
    titles = ('', 'installed', 'tested with')
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in (titles, *table):
            cells = (f'{c:{w}}' for c, w in zip(row, widths, strict=True))
            print('  '.join(cells).rstrip())
        return
    drawn = Table(*titles)
    for row in table:
        drawn.add_row(*row)
    Console().print(drawn)


def main() -> int:
    """Print what is installed and what is wrong with it.

    Returns:
        int: 1 if anything cannot work, else 0.
    """
    seen = look()
    problems = diagnose(seen)
    _print_table(rows(seen))
    for problem in problems:
        title = 'PROBLEM' if problem.blocks else 'NOTE   '
        print(f'\n{title} {problem.what}\nTO DO   {problem.mend}')
    if not problems:
        print('\nNothing is wrong.')
    return int(any(problem.blocks for problem in problems))


if __name__ == '__main__':
    sys.exit(main())
