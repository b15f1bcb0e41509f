"""Train many runs of one config on one pass of the frozen trunk.

    e3va sweep CONFIG --set optim_wrapper.optimizer.lr=2e-4,1e-3 --seeds 3

All combinations train together: each image is loaded and goes through the
trunk once, and each run has its side path, neck, heads, optimizer, schedule,
checkpoints and log. If interrupted, rerun the command to resume; rerun it with
other values to add runs. WORK_DIR holds a folder for each run, sweep.json (all
runs), sweep.md (the table, best first) and sweep.png (the curves).
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from e3va_mm.commands import launching
from e3va_mm.commands.compare import metric_of
from e3va_mm.comparison.records import AUTO
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.sweep import (
    Setting,
    SweepRecords,
    check_together,
    draw,
    markdown,
    setting_config,
    settings_of,
    train_together,
    turns_of,
)
from e3va_mm.utils.configs import content_key
from e3va_mm.utils.files import write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va sweep``."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    return launching.exit_code(sweep, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'e3va sweep',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', metavar='CONFIG')
    values = 'values of an option of the config; all combinations are runs'
    kind = dict(nargs='+', action=launching.Options, default={})
    add('--set', dest='options', metavar='KEY=A,B', help=values, **kind)
    add('--seeds', type=int, default=1, help='seeds of each combination')
    together = 'runs that train together at most; others wait. Default: all'
    add('--together', type=int, metavar='N', help=together)
    metric = 'what ranks; default: coco/bbox_mAP or mIoU, by the evaluator'
    add('--metric', help=metric)
    folder = 'default: work_dirs/sweep/ and the name of the config'
    add('--work-dir', help=folder)
    add('--cfg-options', help='settings of all runs', **kind)
    return parser


def sweep(args: argparse.Namespace) -> None:
    """Train what is left, and report."""
    for name in ('seeds', 'together'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(
                f'--{name} should be at least 1, but got {value}.'
            )
    folder = Path(
        args.work_dir or Path('work_dirs', 'sweep', Path(args.config).stem)
    )
    args.work_dir, args.launcher, args.local_rank = str(folder), 'none', 0
    config = launching.load_config(
        args, 'train_dataloader', 'train_cfg', 'optim_wrapper'
    )
    data_seed = (config.get('randomness') or {}).get('seed') or 0
    seeds = range(data_seed, data_seed + args.seeds)
    settings = settings_of(args.options, seeds)
    configs = {each.name: setting_config(config, each) for each in settings}
    check_together(configs)
    for name, own in configs.items():
        own.work_dir = str(folder / name)
    records = _records(args, config, folder, data_seed)
    left = records.plan(settings)
    _train(args, records, left, configs, data_seed)
    text = markdown(records) + '\n'
    write_whole(folder / 'sweep.md', text.encode())
    draw(records).savefig(folder / 'sweep.png', dpi=150)
    print(text)
    if all(row.get('diverged') for row in records.runs.values()):
        raise E3VAError('All runs have diverged; their logs say where.')


def _records(
    args: argparse.Namespace, config: Config, folder: Path, seed: int
) -> SweepRecords:
    metric = args.metric
    if metric is None and config.get('val_dataloader'):
        metric = metric_of(config)
        if metric == AUTO:
            raise ConfigError(
                '--metric should name the metric that ranks, as the log of an '
                'evaluation has it.'
            )
    content = copy.deepcopy(config)
    content.work_dir = None  # a folder may be moved
    settings = dict(
        config=Path(args.config).name,
        content=content_key(content),
        metric=metric,
        data_seed=seed,
    )
    return SweepRecords(folder, settings)


def _train(
    args: argparse.Namespace,
    records: SweepRecords,
    left: Sequence[Setting],
    configs: dict[str, Config],
    seed: int,
) -> None:
    """Train in turns, under a bar."""
    unfinished = {each.name: configs[each.name] for each in left}
    turns = turns_of(unfinished, args.together or len(configs))
    done = len(configs) - len(left)
    print(
        f'{len(configs)} runs'
        + f', {done} of them done before' * bool(done)
        + (f'; {len(turns)} turns of' if len(turns) > 1 else '; together')
        + f' {", ".join(str(len(turn)) for turn in turns) or "none"}'
    )
    columns = (
        *('turn {task.fields[turn]}', BarColumn(), MofNCompleteColumn()),
        *('loss {task.fields[loss]}', TimeElapsedColumn()),
        *('left', TimeRemainingColumn()),
    )
    # No thread of its own: data workers are forked meanwhile.
    with Progress(
        *columns, console=Console(stderr=True), auto_refresh=False
    ) as progress:
        for number, turn in enumerate(turns, 1):
            label = f'{number} of {len(turns)}'
            task = progress.add_task('', total=None, turn=label, loss='-')

            def on_step(
                done: int, total: int, losses: dict, task: int = task
            ) -> None:
                shown = ' '.join(f'{x:.3f}' for x in losses.values())
                values = dict(completed=done, total=total, loss=shown)
                progress.update(task, **values, refresh=True)

            def on_validation(name: str, metrics: dict) -> None:
                value = metrics.get(records.settings['metric'])
                if value is not None:
                    progress.console.print(f'{name}: {value:.4g}')

            chosen = {name: unfinished[name] for name in turn}
            ended = train_together(chosen, seed, on_step, on_validation)
            for name in turn:
                records.end(name, ended.get(name))
                if name in ended:
                    first = ended[name].splitlines()[0]
                    progress.console.print(f'{name} has ended: {first}')
