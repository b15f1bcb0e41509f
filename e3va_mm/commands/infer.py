r"""Run one or many tasks on images and videos, on one pass of their trunk.

    e3va infer photos/ clip.mp4 --out found \
        --task boxes=configs/cascade.py:boxes.safetensors \
        --task parts=configs/upernet.py:parts.safetensors

Each task is a detector, a segmentor or a classifier with a side path, given by
its config and an adapter file or checkpoint, or by an adapter file alone, also
one that is shared (`--adapter hf://ORG/NAME`). For each image OUT/TASK/preds
gets a file (JSON; of a segmentor a PNG of classes), OUT/TASK/vis a drawing.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.apis.images import Images
from e3va_mm.apis.result_writer import ResultWriter
from e3va_mm.apis.sharing import config_of
from e3va_mm.commands.launching import exit_code, read_config
from e3va_mm.errors import ConfigError
from e3va_mm.weights.hub import ADAPTER, fetch

# A file may be a URL, with a colon of its own.
TASK = re.compile(r'([^=]+)=(.+?\.py):(.+)')


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va infer``; arguments and result as of ``train.main``."""
    parser = argparse.ArgumentParser(
        'e3va infer',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    inputs = 'an image, a URL of one, a folder or a video'
    add('inputs', nargs='+', metavar='INPUT', help=inputs)
    task = dict(metavar='NAME=CONFIG:FILE', help='once for each task')
    add('--task', action='append', default=[], **task)
    text = 'the same by an adapter file alone, whose config is in it; also '
    text += 'hf://ORG/NAME, or e3va_mm://NAME of the package'
    adapter = dict(metavar='[NAME=]FILE', help=text)
    add('--adapter', action='append', default=[], **adapter)
    add('--out', required=True, help='a folder')
    add('--batch-size', type=int, default=1, help='images of one size at once')
    thr = 'boxes with a lower score are not drawn (default: 0.3)'
    add('--score-thr', type=float, default=0.3, help=thr)
    untuned = 'give what the models gave before they were tuned'
    add('--untuned', action='store_true', help=untuned)
    text = 'names to find, such as "cat. dog.", for models that read'
    add('--text', help=text)
    add('--no-draw', action='store_true', help='write predictions alone')
    add('--device', help='such as cpu or cuda:0')
    return exit_code(_infer, parser.parse_args(argv))


def _named(text: str) -> tuple[str, str]:
    """Name and file of ``[NAME=]FILE``; its own name by default."""
    name, equals, file = text.partition('=')
    return (name, file) if equals else (PurePath(text).stem, text)


def _infer(args: argparse.Namespace) -> None:
    # What loaders say of each tensor is no news here.
    MMLogger.get_current_instance().setLevel('WARNING')
    tasks = {}
    for text in args.task:
        parts = TASK.fullmatch(text)
        if parts is None or parts[1] in tasks:
            raise ConfigError(
                '--task should be NAME=CONFIG.py:FILE, with a new NAME each, '
                'such as boxes=configs/cascade.py:boxes.safetensors, but got '
                f'{text}.'
            )
        name, config, file = parts.groups()
        if Path(config).is_file():
            config = read_config(config)
        tasks[name] = config, file
    for text in args.adapter:
        name, file = _named(text)
        path = file
        if file.startswith('hf://'):
            whole = file.count('/') == 3  # hf://ORG/NAME
            path = str(fetch(f'{file}/{ADAPTER}' if whole else file))
        if name in tasks:
            raise ConfigError(
                f'Two tasks are named {name!r}. Name them: --adapter '
                f'NAME={file}'
            )
        tasks[name] = config_of(path), path
    if not tasks:
        raise ConfigError('Expected at least one --task or --adapter.')
    folders = [Path(args.out, name) for name in tasks]
    images = Images(args.inputs, folders)
    infer = MultiTaskInferencer(tasks, args.device)
    out = ResultWriter(args.out, infer.tasks, not args.no_draw, args.score_thr)
    found = infer.run(images, args.batch_size, not args.untuned, args.text)
    console, count = Console(stderr=True), 0
    with out:
        for image, results in track(
            found, 'Inference', len(images) or None, console=console
        ):
            out.write(image, results)
            count += 1
    trunks = {
        ' + '.join(sorted([name, *infer.on_trunk_of(name)])) for name in tasks
    }
    print(
        f'{args.out}: {count} images, {len(tasks)} tasks, '
        f'{infer.passes} passes of a trunk\n'
        f'trunks: {"; ".join(sorted(trunks))}'
    )
