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
BESIDE = {'fontsize': 8, 'loc': 'center left', 'bbox_to_anchor': (1, 0.5)}


def read_run(path):
    """Read the records of one scalars.json.

    Args:
        path (Path): A file with one JSON object per line. The last line may
            be cut off, as an interruption leaves it.

    Returns:
        tuple[dict, dict]: Training and validation records by iteration. The
        iteration of a validation is that of the last training record before
        it, so that loops by epoch and by iteration look alike.
    """
    train, val, iteration = {}, {}, 0
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if 'loss' in record:
            iteration = record['step']
            train[iteration] = record
        else:
            val[iteration] = record
    return train, val


def read_work_dir(work_dir):
    """Join the records of all runs in a work directory.

    Args:
        work_dir (Path): The directory; its runs are named by their time.

    Returns:
        tuple[dict, dict]: Training and validation records by iteration.

    Raises:
        DataError: If no run has written a training record.
    """
    train, val = {}, {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        new_train, new_val = read_run(path)
        if not new_train:
            continue
        first = min(new_train)
        train = {i: r for i, r in train.items() if i < first} | new_train
        val = {i: r for i, r in val.items() if i < first} | new_val
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


def keys_of(records):
    """All keys of some records, sorted."""
    return sorted(set().union(*records.values())) if records else []


def draw(train, val, title):
    """Draw losses, accuracies and the learning rate.

    Args:
        train (dict): Training records by iteration.
        val (dict): Validation records by iteration, may be empty.
        title (str): Title of the figure.

    Returns:
        matplotlib.figure.Figure: Three panels above a common axis.
    """
    figure, (losses, accuracies, rate) = plt.subplots(
        3,
        1,
        figsize=(10, 9),
        sharex=True,
        height_ratios=[3, 3, 1],
        layout='constrained',
    )
    figure.suptitle(title)
    parts = [key for key in keys_of(train) if 'loss' in key and key != 'loss']
    for key in parts:
        losses.plot(*series(train, key), linewidth=0.8, alpha=0.7, label=key)
    losses.plot(*series(train, 'loss'), color='black', label='loss')
    losses.set(ylabel='loss', yscale='log')
    losses.legend(**BESIDE)

    for key in keys_of(val):
        if key.endswith(HEADLINES):
            iterations, values = series(val, key)
            # The last value, where no other one can lie over it.
            label = f'{key}: {values[-1]:.3g}'
            accuracies.plot(iterations, values, marker='.', label=label)
    accuracies.set(ylabel='accuracy on the validation split')
    if accuracies.lines:
        accuracies.set_ylim(bottom=0)
        accuracies.legend(**BESIDE)
    else:
        accuracies.text(
            0.5,
            0.5,
            'not validated yet',
            ha='center',
            transform=accuracies.transAxes,
        )

    rate.plot(*series(train, 'lr'))
    rate.set(ylabel='learning rate', xlabel='iteration')
    for axes in (losses, accuracies, rate):
        axes.grid(alpha=0.3)
    return figure


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('work_dir', type=Path)
    parser.add_argument(
        '--out', type=Path, help='the PNG (default: WORK_DIR/curves.png)'
    )
    args = parser.parse_args(argv)
    out = args.out or args.work_dir / 'curves.png'
    try:
        train, val = read_work_dir(args.work_dir)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(train, val, args.work_dir.name)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    print(f'{out}: {len(train)} training and {len(val)} validation records')


if __name__ == '__main__':
    main()
