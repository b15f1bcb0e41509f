"""The doctor's report: versions, problems and what mends them."""

import platform

from e3va_mm.doctor.checks import diagnose
from e3va_mm.doctor.snapshot import PACKAGES, Snapshot, look

#: What the test suite runs with.
TESTED = {
    'Python': '3.11',
    'torch': '2.13.0',
    'mmengine': '0.10.12',
    'mmcv': '2.3.6',
    'mmdet': '3.5.1',
    'mmseg': '1.4.2',
    'mmpretrain': '1.3.6',
}


def rows(seen: Snapshot) -> list[tuple[str, str, str]]:
    """The table: what, as it is installed, as it was tested."""
    table = [('Python', platform.python_version(), TESTED['Python'])]
    for package in PACKAGES:
        found = ', '.join(f'{n} {v}' for n, v in seen.of(package).items())
        if package == 'torch' and found:
            found += f', CUDA {seen.cuda}' if seen.cuda else ', CPU'
        table.append((package, found or '-', TESTED.get(package, '')))
    for name, capability in seen.devices.items():
        table.append(('GPU', f'{name}, {capability}', ''))
    if not seen.devices:
        table.append(('GPU', 'none that torch sees', ''))
    return table


def report() -> int:
    """Print what is installed and what is wrong with it.

    Returns:
        int: 1 if anything cannot work, else 0.
    """
    seen = look()
    problems = diagnose(seen)
    table = [('', 'installed', 'tested with'), *rows(seen)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f'{c:{w}}' for c, w in zip(row, widths, strict=True))
        print('  '.join(cells).rstrip())
    for problem in problems:
        title = 'PROBLEM' if problem.blocks else 'NOTE   '
        print(f'\n{title} {problem.what}\nTO DO   {problem.mend}')
    if not problems:
        print('\nNothing is wrong.')
    return int(any(problem.blocks for problem in problems))
