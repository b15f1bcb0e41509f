"""Draw the training curves of a work directory as one PNG.

Reads what mmengine's LocalVisBackend wrote, over all runs of the directory: a
resumed run replaces what an interrupted one did beyond their common
checkpoint.

Run: python tools/plot_curves.py work_dirs/quickstart
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.errors import DataError, E3VAError

# Of the accuracies of a validation, those worth a curve.
HEADLINES = ('_mAP', '_mAP_50', '/mAP', 'mIoU', 'mAcc', 'aAcc')


def read_work_dir(work_dir):
    """Join the records of all runs in a work directory.

    Args:
        work_dir (Path): The directory; its runs are named by their time.

    Returns:
        tuple[dict, dict]: Training and validation records by iteration; that
        of a validation is the last training record's before it, so that
        loops by epoch and by iteration look alike.

    Raises:
        DataError: If no run has written a training record.
    """
    train, val = {}, {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        iteration = None
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off by an interruption
                continue
            if 'loss' in record:
                if iteration is None:
                    first = record['step']
                    train = {i: r for i, r in train.items() if i < first}
                    val = {i: r for i, r in val.items() if i < first}
                iteration = record['step']
                train[iteration] = record
            elif iteration is not None:
                val[iteration] = record
    if not train:
        raise DataError(
            f'{work_dir} should hold */vis_data/scalars.json with training '
            'records, but there are none. Train into this directory first: '
            f'python tools/train.py CONFIG --work-dir {work_dir}'
        )
    return train, val


def series(records, key):
    """Iterations and values of one key, where it was recorded."""
    found = [(i, r[key]) for i, r in sorted(records.items()) if key in r]
    return [i for i, _ in found], [value for _, value in found]


def draw(train, val, title):
    """Draw losses, accuracies and the learning rate.

    Args:
        train (dict): Training records by iteration.
        val (dict): Validation records by iteration, may be empty.
        title (str): Title of the figure.

    Returns:
        matplotlib.figure.Figure: Three panels above a common axis.
    """
    shape = dict(height_ratios=[3, 3, 1], figsize=(10, 9))
    figure, panels = plt.subplots(
        3, sharex=True, layout='constrained', **shape
    )
    losses, accuracies, rate = panels
    figure.suptitle(title)
    keys = sorted(set().union(*train.values()))
    for key in (key for key in keys if 'loss' in key and key != 'loss'):
        losses.plot(*series(train, key), linewidth=0.8, label=key)
    losses.plot(*series(train, 'loss'), color='black', label='loss')
    losses.set(ylabel='loss', yscale='log')
    for key in sorted(set().union(*val.values())):
        if key.endswith(HEADLINES):
            iterations, values = series(val, key)
            # The last value, where no other one can lie over it.
            label = f'{key}: {values[-1]:.3g}'
            accuracies.plot(iterations, values, marker='.', label=label)
    accuracies.set(ylabel='accuracy on the validation split')
    rate.plot(*series(train, 'lr'))
    rate.set(ylabel='learning rate', xlabel='iteration')
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add('work_dir', type=Path)
    add('--out', type=Path, help='the PNG (default: WORK_DIR/curves.png)')
    args = parser.parse_args(argv)
    out = args.out or args.work_dir / 'curves.png'
    try:
        train, val = read_work_dir(args.work_dir)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(train, val, args.work_dir.name).savefig(out, dpi=120)
    print(f'{out}: {len(train)} training and {len(val)} validation records')


if __name__ == '__main__':
    main()
