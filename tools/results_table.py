"""Print the table of a work directory: accuracy, parameters, memory, time.

Joins what tools/test.py wrote below WORK_DIR/test with what tools/measure.py
wrote to WORK_DIR/measured.json, as Markdown.

Run: python tools/results_table.py work_dirs/quickstart
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.errors import DataError, E3VAError

MIB = 2**20
# What the config measured as it is stands for in the quickstart.
NAMES = {'as-is': 'e3va'}
ACCURACIES = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
MEASURED = ('trainable', 'of the backbone', 'peak MiB', 's/step')


def newest_accuracies(work_dir):
    """Read the figures of the last evaluation.

    Args:
        work_dir (Path): Its folder ``test`` was the work directory of
            tools/test.py, which keeps one folder for each run.

    Returns:
        dict[str, float]: Heading of the table to value, between 0 and 1.

    Raises:
        DataError: If no evaluation has written figures.
    """
    files = sorted((work_dir / 'test').glob('*/*.json'))
    if not files:
        raise DataError(
            f'{work_dir / "test"} should hold the figures of an evaluation, '
            'but there are none. Evaluate first: python tools/test.py CONFIG '
            f'CHECKPOINT --work-dir {work_dir / "test"}'
        )
    found = json.loads(files[-1].read_text().splitlines()[-1])
    return {ACCURACIES[k]: found[k] for k in ACCURACIES if k in found}


def measured_rows(work_dir):
    """Read what was measured.

    Args:
        work_dir (Path): Holds measured.json of tools/measure.py.

    Returns:
        dict[str, dict]: Variant to its figures.

    Raises:
        DataError: If there is no such file, or a measurement was interrupted.
    """
    path = work_dir / 'measured.json'
    rows = json.loads(path.read_text())['variants'] if path.exists() else {}
    if not rows or not all(
        'memory_bytes' in r and 'seconds' in r for r in rows.values()
    ):
        raise DataError(
            f'{path} should hold memory and time of every variant, but does '
            'not. Measure first: python tools/measure.py CONFIG --compare '
            f'full,frozen --json {path}'
        )
    return rows


def markdown(accuracies, variants):
    """Lay out the table.

    Args:
        accuracies (dict[str, float]): Of the first variant, the trained one.
        variants (dict[str, dict]): Rows of measured.json.

    Returns:
        str: A Markdown table; a dash stands for what was not trained.
    """
    rows = [
        ['', *accuracies, *MEASURED],
        ['---', *['---:'] * (len(accuracies) + len(MEASURED))],
    ]
    for i, (name, measured) in enumerate(variants.items()):
        values = [f'{v:.3f}' if i == 0 else '-' for v in accuracies.values()]
        parameters = measured['parameters']
        rows.append(
            [
                NAMES.get(name, name),
                *values,
                f'{parameters["trainable"]:,}',
                f'{parameters["trainable_backbone"]:,}',
                f'{measured["memory_bytes"]["peak"] / MIB:,.1f}',
                f'{statistics.median(measured["seconds"]):.3f}',
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('work_dir', type=Path)
    work_dir = parser.parse_args(argv).work_dir
    try:
        accuracies = newest_accuracies(work_dir)
        variants = measured_rows(work_dir)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    print(markdown(accuracies, variants))
    print(
        '\nAP on the test split; full and frozen were measured for some '
        'steps, not trained.'
    )


if __name__ == '__main__':
    main()
