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
from e3va_mm.utils.sizes import MIB

# The config as it is: the one of these that was trained.
NAMES = {'as-is': 'trained'}
ACCURACIES = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
MEASURED = ('trainable', 'of the backbone', 'peak MiB', 's/step')


def table(work_dir):
    """Lay out the table of a work directory.

    Args:
        work_dir (Path): Holds ``measured.json``, and in ``test`` the work
            directory of tools/test.py.

    Returns:
        str: A Markdown table; a dash stands for what was not trained.

    Raises:
        DataError: If nothing was evaluated, or not all was measured.
    """
    evaluations = sorted((work_dir / 'test').glob('*/*.json'))
    if not evaluations:
        raise DataError(
            f'{work_dir / "test"} should hold the figures of an evaluation, '
            'but there are none. Evaluate first: python tools/test.py CONFIG '
            f'CHECKPOINT --work-dir {work_dir / "test"}'
        )
    path = work_dir / 'measured.json'
    variants = (
        json.loads(path.read_text())['variants'] if path.exists() else {}
    )
    if not variants or not all(
        'memory_bytes' in v and 'seconds' in v for v in variants.values()
    ):
        raise DataError(
            f'{path} should hold memory and time of every variant, but does '
            'not. Measure first: python tools/measure.py CONFIG --compare '
            f'full,frozen --json {path}'
        )
    figures = json.loads(evaluations[-1].read_text().splitlines()[-1])
    trained = {ACCURACIES[k]: figures[k] for k in ACCURACIES if k in figures}
    rows = [
        ['', *trained, *MEASURED],
        ['---', *['---:'] * (len(trained) + len(MEASURED))],
    ]
    for i, (name, measured) in enumerate(variants.items()):
        parameters = measured['parameters']
        rows.append(
            [
                NAMES.get(name, name),
                *(f'{v:.3f}' if i == 0 else '-' for v in trained.values()),
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
    try:
        print(table(parser.parse_args(argv).work_dir))
    except E3VAError as error:
        sys.exit(f'error: {error}')
    print(
        '\nAP on the test split; full and frozen were measured for some '
        'steps, not trained.'
    )


if __name__ == '__main__':
    main()
