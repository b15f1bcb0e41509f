r"""Run one or many tasks on pictures and videos, on one pass of their trunk.

    python tools/infer.py photos/ clip.mp4 --out found \
        --task boxes=configs/cascade.py:boxes.safetensors \
        --task parts=configs/upernet.py:parts.safetensors

Each task is a detector, a segmentor or a classifier with a side path, given by
its config and an adapter file or checkpoint. Of each picture OUT/TASK/preds
gets a file (JSON; of a segmentor a PNG of classes), OUT/TASK/vis a drawing.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before the frameworks, which its checks and remedies are for.
import e3va_mm.checkpoint  # noqa: F401  isort: skip
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.apis.pictures import Pictures
from e3va_mm.apis.result_writer import ResultWriter
from e3va_mm.errors import ConfigError, E3VAError

# A file may be a URL, with a colon of its own.
TASK = re.compile(r'(?P<name>[^=]+)=(?P<config>.+?\.py):(?P<file>.+)')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='a picture, a URL of one, a folder or a video',
    )
    parser.add_argument(
        '--task',
        action='append',
        required=True,
        metavar='NAME=CONFIG:FILE',
        help='once for each task; FILE is an adapter file or a checkpoint',
    )
    parser.add_argument('--out', type=Path, required=True, help='a folder')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='pictures of one size at once (default: 1)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='boxes with a lower score are not drawn (default: 0.3)',
    )
    parser.add_argument(
        '--no-draw', action='store_true', help='write predictions alone'
    )
    parser.add_argument('--device', help='such as cpu or cuda:0')
    return parser.parse_args(argv)


def tasks_of(texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Config and file by the name of the task.

    Raises:
        ConfigError: If a text is none, or a name comes twice.
    """
    tasks = {}
    for text in texts:
        parts = TASK.fullmatch(text)
        if parts is None:
            raise ConfigError(
                '--task should be NAME=CONFIG.py:FILE, such as '
                f'boxes=configs/cascade.py:boxes.safetensors, but got {text}.'
            )
        if parts['name'] in tasks:
            raise ConfigError(
                f'--task {parts["name"]} is there twice. Take another name.'
            )
        tasks[parts['name']] = parts['config'], parts['file']
    return tasks


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tasks."""
    args = parse_args(argv)
    # What loaders say of each tensor is no news here.
    MMLogger.get_current_instance().setLevel('WARNING')
    tasks = tasks_of(args.task)
    pictures = Pictures(args.inputs)
    infer = MultiTaskInferencer(tasks, args.device)
    with ResultWriter(
        args.out, infer.tasks, not args.no_draw, args.score_thr
    ) as writer:
        count = 0
        for picture, results in track(
            infer.run(pictures, args.batch_size),
            'Inference',
            len(pictures) or None,
            console=Console(stderr=True),
        ):
            writer.write(picture, results)
            count += 1
    trunks = {
        ' + '.join(sorted([name, *infer.on_trunk_of(name)])) for name in tasks
    }
    print(
        f'{args.out}: {count} pictures, {len(tasks)} tasks, '
        f'{infer.passes} passes of a trunk\n'
        f'trunks: {"; ".join(sorted(trunks))}'
    )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
