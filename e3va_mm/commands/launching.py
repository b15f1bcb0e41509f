"""What the commands share: configs, launchers, runs, and errors in words."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from e3va_mm.engine.hooks import ProgressBarHook
from e3va_mm.errors import CheckpointError, ConfigError, E3VAError
from e3va_mm.frameworks.cpu_processes import use_gloo
from e3va_mm.frameworks.distributions import PACKAGES
from e3va_mm.preflight import (
    NAMES,
    DatasetCheckHook,
    check_batch,
    explain_batch_norm,
    explain_data_failure,
    require_names,
)
from e3va_mm.registry import install
from e3va_mm.utils.process_group import end_process_group

# The disk itself, a quota, a limit of the process.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Set, it has errors in a config show where they come from.
TRACE = 'E3VA_STACK_TRACE'
# Where mmengine builds the parts of a config.
BUILDERS = ('mmengine/runner/runner.py', 'registry/build_functions.py')
# What configs of mmdet 2.x and mmseg 0.x have.
OLD_KEYS = 'data', 'runner', 'optimizer', 'lr_config', 'total_epochs'


def exit_code(
    command: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
) -> int:
    """Run a command; print errors that the user can correct in words.

    Returns:
        int: What the command returns, 0 for None; 1 after an error that was
        printed, 130 after an interruption. Other errors keep their trace.
    """
    resume = '; continue with --resume' if 'resume' in args else ''
    install()
    try:
        code = command(args) or 0
    except KeyboardInterrupt:
        print(f'error: interrupted{resume}', file=sys.stderr)
        return 130
    except Exception as e:
        error = _user_error(e)
        if error is None:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                raise
            traceback.print_exc()
            # Whoever waits for a process that was killed fails as well, in
            # words of the network; on other machines nobody else tells.
            error = (
                f'rank {dist.get_rank()} of {dist.get_world_size()} failed '
                f'with the {type(e).__name__} above. If that is a lost '
                'connection or a timeout, another rank died before: see its '
                f'last lines, or "Root Cause" of torchrun{resume}'
            )
            print(f'error: {error}', file=sys.stderr)
            return 1
        text = str(error)
        if text.startswith('Caught ') and 'Original Traceback' in text:
            # A data worker puts its stack trace around it.
            text = text.rpartition(f'{type(error).__name__}: ')[2].strip()
        print(f'error: {text}', file=sys.stderr)
        del error  # its stack holds the runner
        code = 1
    if dist.is_initialized():
        if code == 0:
            # Together: one that leaves while another works can abort.
            dist.barrier()
        end_process_group()
    return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, as a stack trace shows them."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__  # raised `from None`
        error = error.__cause__ or (None if hidden else error.__context__)


def _user_error(error: BaseException) -> E3VAError | None:
    """The innermost error of ours: mmengine's registry may wrap it."""
    ours = [each for each in _chain(error) if isinstance(each, E3VAError)]
    return ours[-1] if ours else None


class Options(DictAction):
    """Options of a config as ``key=value``; others are refused in words."""

    def __call__(self, parser, namespace, values, *args) -> None:
        """Parse them."""
        try:
            super().__call__(parser, namespace, values, *args)
        except Exception as e:
            wrong = [text for text in values if '=' not in text] or values
            raise argparse.ArgumentError(
                self, f'expected key=value, but got {" ".join(wrong)}'
            ) from e


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what training and testing have in common."""
    parser.add_argument('config', help='the config file')
    parser.add_argument('--work-dir', help='the folder for logs and models')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        help='override settings of the config, as key=value; a list is '
        'written key="[a,b]" or key=a,b, without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of the job',
    )
    add_skip(parser)
    # torchrun passes the rank by environment, its forerunners as an option.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_skip(parser: argparse.ArgumentParser) -> None:
    """Add what switches checks off."""
    parser.add_argument(
        '--skip-check',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f'checks of config and data to leave out: {", ".join(NAMES)}',
    )


def read_config(path: str | Path, options: dict | None = None) -> Config:
    """Read a config; ConfigError if that fails or its framework is missing.

    Args:
        path (str | Path): The config file.
        options (dict, optional): Those of ``--cfg-options``.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such config file.')
    try:
        config = Config.fromfile(path)
    except Exception as e:
        # A missing `_base_` file or framework, or a slip of the pen.
        line = '' if isinstance(e, SyntaxError) else _config_line(e)
        raise ConfigError(f'{path} cannot be read: {line}{_named(e)}') from e
    try:
        config.merge_from_dict(options or {})
    except Exception as e:
        text = ' '.join(f'{key}={value}' for key, value in options.items())
        raise ConfigError(
            f'--cfg-options {text} does not fit {path}: {_named(e)}'
        ) from e
    old = [key for key in OLD_KEYS if key in config]
    if len(old) > 1 and 'train_dataloader' not in config:
        raise ConfigError(
            f'{path} is a config of the 2.x line of MMDetection (0.x of '
            f'MMSegmentation): it sets {", ".join(old)}; expected '
            'train_dataloader, train_cfg and optim_wrapper. Write it anew '
            'after the config of the same name in the installed version; '
            'https://mmdetection.readthedocs.io/en/latest/migration/ tells '
            'how.'
        )
    scope = config.setdefault('default_scope', 'mmengine')
    if scope is not None and find_spec(scope) is None:
        raise ConfigError(
            f'{path} is a config of {scope}, which is not installed. '
            f'Install it: pip install {PACKAGES.get(scope, scope)}'
        )
    return config


def _named(error: BaseException) -> str:
    """An error as the last line of its stack trace."""
    return ''.join(traceback.format_exception_only(error)).strip()


def _config_line(error: BaseException) -> str:
    """File and line in a config at which an error arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == '<module>' and Path(frame.filename).is_file():
            return f'{frame.filename}, line {frame.lineno}: '
    return ''


def load_config(args: argparse.Namespace, *keys: str) -> Config:
    """The config of a run, which has to set some keys."""
    config = read_config(args.config, args.cfg_options)
    require(config, *keys)
    if config.default_scope == 'mmpretrain':
        # As in its own tools: batches are stacked by the loader.
        for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if config.get(name):
                collate = dict(type='default_collate')
                config[name].setdefault('collate_fn', collate)
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = f'./work_dirs/{Path(args.config).stem}'
    config.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError(
            '--launcher pytorch is for processes started by torchrun: '
            f'torchrun --nproc_per_node=N {" ".join(sys.argv)}'
        )
    if args.launcher == 'slurm' and 'SLURM_PROCID' not in os.environ:
        raise ConfigError(
            '--launcher slurm is for processes started by srun; '
            'tools/slurm_train.sh and tools/slurm_test.sh start them.'
        )
    if get_device() == 'cpu' and args.launcher in ('pytorch', 'slurm'):
        use_gloo(config)
    return config


def require(config: Config, *keys: str) -> None:
    """Raise ConfigError unless a config sets all of some keys."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ConfigError(
            f'{config.filename} should set {", ".join(keys)}, but '
            f'{", ".join(missing)} is missing.'
        )
    for key in keys:
        if key.endswith(('_dataloader', '_cfg', '_wrapper')) and not (
            isinstance(config[key], Mapping)
        ):
            raise ConfigError(
                f'{config.filename}: {key} should be a dict, but got '
                f'{config[key]!r}.'
            )


def check_checkpoint(path: str | Path) -> None:
    """Raise CheckpointError for a local file that is not there."""
    if '://' not in str(path) and not Path(path).is_file():
        raise CheckpointError(f'{path}: no such checkpoint file.')


def build_model(config: Config) -> nn.Module:
    """The model of a config, without weights."""
    init_default_scope(config.default_scope)
    return MODELS.build(config.model)


def build_runner(config: Config) -> Runner:
    """The runner of a config."""
    build = RUNNERS.build if 'runner_type' in config else Runner.from_cfg
    return build(config)


def run(
    config: Config,
    modes: Sequence[str],
    action: Callable[[Runner], None],
    skip: Sequence[str] = (),
) -> None:
    """Build a runner, check config and data, and run it.

    Args:
        config (Config): The config.
        modes (Sequence[str]): Whose data is read: 'train', 'val', 'test'.
        action (Callable): What to do with the runner.
        skip (Sequence[str]): Names of checks to leave out.
    """
    require_names(skip)
    hooks, checks = [], []
    try:
        with explained(config, modes, checks):
            runner = build_runner(config)
            hooks = runner.hooks
            checks += [h for h in hooks if isinstance(h, DatasetCheckHook)]
            for check in checks:
                check.skip = (*check.skip, *skip)
            if not checks:  # The hook would do it, too.
                checks.append(DatasetCheckHook(skip=skip))
                getattr(checks[0], f'before_{modes[0]}')(runner)
            action(runner)
    finally:
        for hook in hooks:
            if isinstance(hook, ProgressBarHook):
                hook.stop()  # leave the terminal as it was


@contextmanager
def explained(
    config: Config,
    modes: Sequence[str],
    checks: Sequence[DatasetCheckHook] = (),
) -> Iterator[None]:
    """Inside, failures of data and disk are explained.

    What another part of a config fails with while it is built is passed on in
    one line.

    Args:
        config (Config): The config.
        modes (Sequence[str]): Whose data is read: 'train', 'val', 'test'.
        checks (Sequence[DatasetCheckHook]): What has looked at the data.
    """
    try:
        yield
    except Exception as e:
        if _user_error(e) is not None:
            raise
        _check_disk(config.work_dir, e)
        explain_batch_norm(e)
        frames = _building_frames(e)
        if {'build_dataloader', 'build_evaluator'} & set(frames):
            _explain(explain_data_failure, config, modes, e)
        elif not frames and any(check.passed for check in checks):
            _explain(check_batch, checks[0].batch, e)
        if not frames or TRACE in os.environ:
            raise
        raise ConfigError(
            f'{config.filename} cannot be built: {_named(e)}\n'
            f'({_place(e)}; {TRACE}=1 shows the stack trace)'
        ) from e


def _explain(explain: Callable, *args: Any) -> None:
    """Try an explanation; what it fails with hides no first error."""
    try:
        explain(*args)
    except E3VAError:
        raise
    except Exception as e:
        print(f'No explanation: {_named(e)}', file=sys.stderr)


def _building_frames(error: BaseException) -> list[str]:
    """Functions of mmengine that were building a part of a config."""
    return [
        frame.name
        for each in _chain(error)
        for frame in traceback.extract_tb(each.__traceback__)
        if frame.filename.endswith(BUILDERS)
        and frame.name.startswith(('build_', 'from_cfg', '__init__'))
    ]


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{frame.filename}, line {frame.lineno}'


def _check_disk(folder: str, error: BaseException) -> None:
    """Raise CheckpointError for a disk that had no room for something."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in FULL_DISK:
            file = f', file {each.filename}' if each.filename else ''
            raise CheckpointError(
                f'No room for the files of a run (work_dir {folder}{file}): '
                f'{each}. Checkpoints that last_checkpoint names are whole. '
                'Make room, or set `work_dir` to a folder with room, and '
                'continue with --resume.'
            ) from error
