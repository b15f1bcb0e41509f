"""Train a detector, segmentor or classifier by its config."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from e3va_mm.commands import launching
from e3va_mm.engine.hooks import ResumeCheckHook
from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure.batches import BatchSearch, set_batch
from e3va_mm.measure.report import batch_text
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.files import newest_whole
from e3va_mm.utils.sizes import GIB

# What any config could have; see docs/hooks.md.
USEFUL_HOOKS = (
    'TrainableTableHook',
    'DatasetCheckHook',
    'ProgressBarHook',
    'TrainingGuardHook',
    'AtomicCheckpointHook',
    'ResumeCheckHook',
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va train``.

    Args:
        argv (Sequence[str], optional): Defaults to those of this process.

    Returns:
        int: The exit code, see ``launching.exit_code``.
    """
    parser = argparse.ArgumentParser('e3va train', description=__doc__)
    launching.add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='a checkpoint; without a path, the latest in the work directory',
    )
    parser.add_argument(
        '--batch',
        choices=['auto'],
        help='auto: the largest batch that fits, with the images an update '
        'that the config has',
    )
    parser.add_argument(
        '--gpu-memory',
        type=float,
        metavar='GB',
        help="of --batch auto; default: the device's",
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    return launching.exit_code(_train, args)


def _train(args: argparse.Namespace) -> None:
    config = launching.load_config(
        args, 'train_dataloader', 'train_cfg', 'optim_wrapper'
    )
    _set_precision(config, args.amp)
    if args.auto_scale_lr:
        scaling = config.get('auto_scale_lr') or {}
        if not {'enable', 'base_batch_size'} <= set(scaling):
            raise ConfigError(
                '--auto-scale-lr needs `auto_scale_lr=dict(enable=False, '
                f'base_batch_size=N)` in the config, but got {scaling}.'
            )
        scaling.enable = True
    if args.batch or args.gpu_memory:
        _set_batch(config, args)
    _set_resume(config, args.resume)
    launching.run(config, ('train', 'val'), _run, args.skip_check)


def _run(runner: Runner) -> None:
    present = {type(hook).__name__ for hook in runner.hooks}
    missing = [f'e3va_mm.{x}' for x in USEFUL_HOOKS if x not in present]
    if missing:
        runner.logger.info(
            f'Not in this config: {", ".join(missing)} (docs/hooks.md)'
        )
    if runner.cfg.get('resume') and 'ResumeCheckHook' not in present:
        # It changes nothing in the run.
        runner.register_hook(ResumeCheckHook())
    runner.train()


def _set_precision(config: Config, amp: bool) -> None:
    wrapper, device = config.optim_wrapper, get_device()
    name = class_name(wrapper) or 'OptimWrapper'
    if amp and name not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigError(f'--amp needs an OptimWrapper, but got {name}.')
    if (amp or name == 'AmpOptimWrapper') and device in ('cpu', 'mps'):
        raise ConfigError(
            f'AmpOptimWrapper (--amp) needs an accelerator, but the device is '
            f"{device}. Set `optim_wrapper.type='OptimWrapper'`."
        )
    if amp and name == 'OptimWrapper':
        wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')


def _set_batch(config: Config, args: argparse.Namespace) -> None:
    """Let the largest batch train that fits; say which."""
    if not args.batch:
        raise ConfigError(
            '--gpu-memory is for --batch auto. Add it, or set '
            '`train_dataloader.batch_size` yourself.'
        )
    if args.resume or args.launcher != 'none':
        raise ConfigError(
            '--batch auto is for a new run of one process. Continue a run '
            'with the config in its work directory; for several processes, '
            'take the lines of `e3va measure --fits GB --batch auto`.'
        )
    device, memory = get_device(), args.gpu_memory
    if memory is None and device == 'cuda':
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory is None or memory <= 0:
        raise ConfigError(
            '--batch auto needs the memory of the device in GB, such as '
            f'--gpu-memory 8, but got {memory}.'
        )
    search = BatchSearch(config, 'cuda' if device == 'cuda' else 'cpu')
    batch = search.largest(memory)
    set_batch(config, batch)
    print(f'{batch_text(memory, batch)}\n# assuming {search.assumed()}')


def _set_resume(config: Config, resume: str | None) -> None:
    if resume == 'auto':
        # Without a checkpoint, `load_from` of the config still holds.
        folder = Path(config.work_dir)
        config.resume = (folder / 'last_checkpoint').is_file()
        if config.resume:
            # None leaves it to mmengine, which fails if there is none.
            newest = newest_whole(folder)
            config.load_from = newest and str(newest)
    elif resume is not None:
        launching.check_checkpoint(resume)
        config.resume = True
        config.load_from = resume
