"""Whole training steps of the stock Swin configs, by one changed line.

    python benchmarks/stock_configs.py --json work_dirs/stock_configs.json

In every config of MMDetection and MMSegmentation with a Swin backbone,
``model.backbone.type`` becomes ours, and the model takes one training step on
generated input: weights at random, nothing else changed. Left out are configs
with a language model, whose weights and vocabulary are a download. Each
config has a process of its own. Interrupted, the same command goes on; what
failed is tried again. Seconds are those of the first and only step, of all
cores together: what else a machine does hardly changes them.
"""

import argparse
import importlib.util
import multiprocessing
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track

from e3va_mm.measure import TrainingStep
from e3va_mm.measure.results import Results

OURS = 'e3va_mm.E3VASwinTransformer'
FRAMEWORKS = ('mmdet', 'mmseg')


def root(framework: str) -> Path:
    """Where the configs of an installed framework lie."""
    package = importlib.util.find_spec(framework).submodule_search_locations
    return Path(package[0]) / '.mim' / 'configs'


def stock_configs(framework: str) -> Iterator[Path]:
    """The configs with a Swin backbone and without a language model."""
    for path in sorted(root(framework).glob('**/*.py')):
        # Parsing all takes minutes; these say Swin in their name or text.
        if '_base_' in path.parts or 'swin' not in _words(path):
            continue
        try:
            model = parse(path).get('model', {})
        except (FileNotFoundError, ImportError):
            continue  # a parent that upstream lost, or of another package
        backbone = model.get('backbone', {}).get('type')
        if backbone == 'SwinTransformer' and 'language_model' not in model:
            yield path


def _words(path: Path) -> str:
    return f'{path.name} {path.read_text()}'.lower()


def parse(path: Path) -> Config:
    """The config, without the warnings of its parents."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Config.fromfile(path)


def one_step(path: Path, size: int, batch: int) -> dict:
    """Change one line of a config, and take a training step.

    Args:
        path (Path): A config with a stock Swin backbone.
        size (int): Height and width of the pictures in pixels.
        batch (int): Pictures.

    Returns:
        dict: ``seconds`` of processors that the step takes and
        ``parameters``, see :meth:`TrainingStep.parameters`.

    Raises:
        AssertionError: If an adapter has not moved, or a value is not finite.
    """
    MMLogger.get_instance('mmengine', log_level='ERROR')
    config = parse(path)
    config.model.backbone.type = OURS
    step = TrainingStep(config, size=(size, size), batch=batch)
    # Zero before the first step; all that a gradient reaches move.
    adapters = {
        name: parameter.detach().clone()
        for name, parameter in step.model.backbone.named_parameters()
        if 'up.q' in name
    }
    start = time.process_time()
    step.run()
    seconds = time.process_time() - start
    for name, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), f'{name} is not finite'
    for name, parameter in step.model.backbone.named_parameters():
        if name in adapters:
            assert not torch.equal(parameter, adapters[name]), (
                f'{name} has not moved'
            )
    return dict(seconds=seconds, parameters=step.parameters())


def in_a_process(function: Callable, *args) -> dict:
    """What a function returns, or ``error``, from a process of its own."""
    # Not a new interpreter: importing the frameworks takes long.
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        figures = receiver.recv()
    except EOFError:
        figures = None
    process.join()
    return figures or dict(
        error=f'its process ended with {process.exitcode}; with -9 it is '
        'mostly memory that lacks'
    )


def _send(sender, function: Callable, args: tuple) -> None:
    try:
        figures = function(*args)
    except Exception as error:
        line = ' '.join(str(error).split())
        figures = dict(error=f'{type(error).__name__}: {line}'[:300])
    sender.send(figures)


def table(rows: Mapping[str, Mapping]) -> str:
    """The figures as Markdown, and below how many were reached."""
    lines = [
        '| config | CPU s/step | trainable | of the backbone | |',
        '|---|---:|---:|---:|---|',
    ]
    for name, row in rows.items():
        if 'seconds' in row:
            count = row['parameters']
            lines.append(
                f'| {name} | {row["seconds"]:.1f} | {count["trainable"]:,} | '
                f'{count["trainable_backbone"]:,} | |'
            )
        else:
            reason = row.get('error', 'not yet').replace('|', '\\|')
            lines.append(f'| {name} | - | - | - | {reason} |')
    reached = sum('seconds' in row for row in rows.values())
    return '\n'.join([*lines, '', f'{reached} of {len(rows)} reached'])


def label(path: Path) -> str:
    """A stock config as one writes it into ``_base_``, others as they are."""
    for framework in FRAMEWORKS:
        if path.is_relative_to(root(framework)):
            return f'{framework}::{path.relative_to(root(framework))}'
    return str(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps that are missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'configs', nargs='*', type=Path, help='default: all stock ones'
    )
    # The longest stride is 64.
    parser.add_argument('--size', type=int, default=256, help='pixels')
    # Batch norms of maps of 1x1 need two.
    parser.add_argument('--batch', type=int, default=2, help='pictures')
    parser.add_argument('--json', type=Path, help='figures, to go on from')
    args = parser.parse_args(argv)
    paths = [path.resolve() for path in args.configs] or [
        path for name in FRAMEWORKS for path in stock_configs(name)
    ]
    results = Results(
        {label(path): dict(config=str(path)) for path in paths},
        dict(
            environment=dict(
                torch=torch.__version__,
                cpu=platform.machine(),
                threads=torch.get_num_threads(),
            ),
            arguments=dict(size=args.size, batch=args.batch),
        ),
        args.json,
        resume=args.json is not None,
    )
    progress = track(
        paths, 'steps', console=Console(stderr=True), transient=True
    )
    for path in progress:
        row = results.rows[label(path)]
        if 'seconds' not in row:
            row.pop('error', None)
            figures = in_a_process(one_step, path, args.size, args.batch)
            results.update(label(path), **figures)
    print(table(results.rows))


if __name__ == '__main__':
    main()
