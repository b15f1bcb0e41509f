"""Check config and data before a training: every annotation and image.

Builds all parts of a run, reads all annotations, looks at all images and maps
and prints what is wrong: an error or a warning a line. The exit code is 1
after an error. `e3va train` and `e3va test` do the same with the images and
maps that they have time for.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mmengine.config import Config
from rich import box
from rich.console import Console
from rich.table import Table

from e3va_mm.commands import launching
from e3va_mm.errors import E3VAError
from e3va_mm.preflight import (
    Problem,
    grouped,
    opened,
    require_names,
    run_checks,
)
from e3va_mm.utils.unwrapping import unwrapped

WIDE = 160  # where there is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va check``; arguments and result as of ``train.main``."""
    parser = argparse.ArgumentParser(
        'e3va check',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='the config file')
    add('--cfg-options', nargs='+', action=launching.Options)
    launching.add_skip(parser)
    add('--json', action='store_true', help='print JSON instead of a table')
    return launching.exit_code(_check, parser.parse_args(argv))


def _check(args: argparse.Namespace) -> int:
    config = launching.read_config(args.config, args.cfg_options)
    launching.require(config, 'model')
    require_names(args.skip_check)
    config.log_level = 'ERROR'
    with (
        tempfile.TemporaryDirectory() as config.work_dir,
        redirect_stdout(sys.stderr),  # Readers of annotations say much.
    ):
        # Another run of this process may have the name of the config.
        config.experiment_name = Path(config.work_dir).name
        if config.get('visualizer'):
            config.visualizer.name = config.experiment_name
        problems, samples = _problems(config, args.skip_check, args.json)
    errors = sum(each.severity == 'error' for each in problems)
    if args.json:
        rows = [
            {**each._asdict(), 'error': each.error.__name__}
            for each in problems
        ]
        print(json.dumps(dict(samples=samples, problems=rows), indent=2))
    else:
        _print(problems)
        kind = 'error' if errors else 'warning' if problems else 'fine'
        print(
            f'{kind}: {errors} errors and {len(problems) - errors} warnings '
            f'in {samples:,} samples'
        )
    return int(errors > 0)


def _problems(
    config: Config, skip: Sequence[str], quiet: bool
) -> tuple[list[Problem], int]:
    """What is wrong, and how many samples there are."""
    problems: list[Problem] = []

    @contextmanager
    def built(where: str, *modes: str) -> Iterator[None]:
        try:
            with launching.explained(config, modes):
                yield
        except Exception as error:
            named = '' if isinstance(error, E3VAError) else type(error)
            text = f'{named.__name__}: {error}' if named else str(error)
            problems.append(
                Problem(where, text, 'what can be built', '', check='build')
            )

    runner, loaded = None, {}
    with built('config'):
        runner = launching.build_runner(config)
    for mode in ('train', 'val', 'test'):
        loader = f'{mode}_dataloader'
        if runner is not None and config.get(loader) is not None:
            with built(loader, mode):
                loop = getattr(runner, f'{mode}_loop')
                loaded[loader] = loop.dataloader.dataset
    if 'train_dataloader' in loaded:
        with built('optim_wrapper'):
            optimizer = runner.build_optim_wrapper(config.optim_wrapper)
            runner.optim_wrapper = optimizer
            with built('param_scheduler'):
                runner.build_param_scheduler(config.get('param_scheduler', []))
    datasets = opened(loaded, shows=not quiet)
    model = unwrapped(runner.model) if runner is not None else None
    problems += run_checks(config, datasets, model, skip)
    return problems, sum(map(len, datasets.values()))


def _print(problems: Sequence[Problem]) -> None:
    """A table; of many alike the first."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ('', 'where', 'found', 'expected', 'what to do', 'check'):
        table.add_column(name, overflow='fold')
    for group, more in grouped(problems):
        for each in group:
            table.add_row(each.severity, *each[:4], each.check)
        if more:
            rest = each.severity, f'... and {more:,} more', '', '', ''
            table.add_row(*rest, each.check)
    if problems:
        console = Console(highlight=False, markup=False)
        wide = console if console.is_terminal else Console(width=WIDE)
        wide.print(table)
