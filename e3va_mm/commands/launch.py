"""The two tools: train and test a model of either framework by its config.

They take the flags of MMDetection's and MMSegmentation's own tools with their
meaning. What a user can mend is printed as one error; all else keeps its stack
trace.
"""

import argparse
import copy
import errno
import importlib.util
import os
import os.path as osp
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner

from e3va_mm.engine.hooks import (
    ProgressBarHook,
    ResumeCheckHook,
    TrainableTableHook,
    TrainingGuardHook,
)
from e3va_mm.errors import CheckpointError, ConfigError, E3VAError
from e3va_mm.preflight import (
    DatasetCheckHook,
    check_batch,
    explain_data_failure,
)
from e3va_mm.registry import install
from e3va_mm.utils import end_process_group
from e3va_mm.weights.newest import newest_whole

FRAMEWORKS = {
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
    'mmpretrain': 'onedl-mmpretrain',
}
# The disk itself, a quota, a limit of the process.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(argv: Sequence[str] | None = None) -> int:
    """Train a detector, segmentor or classifier.

    Args:
        argv (Sequence[str], optional): Arguments of the command line.
            Defaults to those of this process.

    Returns:
        int: The exit code: 0, 1 after an error that was printed, 130 after
        an interruption.
    """
    return _exit_code(_train, _train_arguments().parse_args(argv))


def test(argv: Sequence[str] | None = None) -> int:
    """Test a detector or segmentor; arguments and result as :func:`train`."""
    return _exit_code(_test, _test_arguments().parse_args(argv))


def _train_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Train a model')
    parser.add_argument('config', help='train config file path')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='enable automatic-mixed-precision training',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a path, the latest one in '
        'the work directory, if there is one',
    )
    _add_common_arguments(parser)
    return parser


def _test_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test a model')
    parser.add_argument('config', help='test config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='where to keep the predictions: a .pkl file for mmdet, a '
        'directory for mmseg',
    )
    parser.add_argument(
        '--show', action='store_true', help='show prediction results'
    )
    parser.add_argument(
        '--show-dir', help='directory to save painted pictures in'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='the interval of show (s)'
    )
    parser.add_argument(
        '--tta', action='store_true', help='test time augmentation'
    )
    _add_common_arguments(parser)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir', help='the directory to save logs and models'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, as key=value; a list is '
        'written key="[a,b]" or key=a,b, without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torchrun passes the rank by environment, its forerunners as an option.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def _exit_code(run: Callable, args: argparse.Namespace) -> int:
    """Run a tool; print an error that the user can mend."""
    code = 0
    install()
    try:
        run(args)
    except KeyboardInterrupt:
        print('error: interrupted; continue with --resume', file=sys.stderr)
        return 130
    except Exception as e:
        error = _mendable(e)
        if error is None and not _has_peers():
            raise
        if error is None:
            traceback.print_exc()
            print(f'error: {_ended(e, run)}', file=sys.stderr)
            return 1
        print(f'error: {_text_of(error)}', file=sys.stderr)
        del error  # its stack holds the runner
        code = 1
    if torch.distributed.is_initialized():
        if code == 0:
            # Together: one that leaves while another works can abort.
            torch.distributed.barrier()
        end_process_group()
    return code


def _has_peers() -> bool:
    """Whether this is one of several processes of a job."""
    group = torch.distributed
    return group.is_initialized() and group.get_world_size() > 1


def _ended(error: Exception, run: Callable) -> str:
    """What an error in one of several processes may mean.

    Whoever waits for a process that was killed fails as well, in words of the
    network, and on other machines nobody else tells.
    """
    rank = torch.distributed.get_rank()
    text = (
        f'rank {rank} of {torch.distributed.get_world_size()} has ended with '
        f'the {type(error).__name__} above. If that is a lost connection or a '
        'timeout, another rank has died before: see its own last lines, or '
        '"Root Cause" of torchrun, on whichever machine it ran.'
    )
    if run is _train:
        text += (
            ' The same command with --resume goes on from the last checkpoint.'
        )
    return text


def _text_of(error: E3VAError) -> str:
    """What an error says, without what a data worker puts around it."""
    text = str(error)
    if text.startswith('Caught ') and 'Original Traceback' in text:
        text = text.rpartition(f'{type(error).__name__}: ')[2].strip()
    return text


def _mendable(error: BaseException | None) -> E3VAError | None:
    """The innermost error of ours among the causes of an exception.

    Some versions of mmengine's registry raise it again with text before it.
    """
    found = None
    while error is not None:
        if isinstance(error, E3VAError):
            found = error
        hidden = error.__suppress_context__  # raised `from None`
        error = error.__cause__ or (None if hidden else error.__context__)
    return found


def _train(args: argparse.Namespace) -> None:
    cfg = _load_config(args)
    _require(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    _set_precision(cfg, args.amp)
    if args.auto_scale_lr:
        scaling = cfg.get('auto_scale_lr') or {}
        if not {'enable', 'base_batch_size'} <= set(scaling):
            raise ConfigError(
                '--auto-scale-lr needs '
                '`auto_scale_lr=dict(enable=False, base_batch_size=N)` in '
                f'the config, but got {dict(scaling) or None}.'
            )
        cfg.auto_scale_lr.enable = True
    _set_resume(cfg, args.resume)
    _save_whole_files(cfg)
    _add_hooks(
        cfg,
        TrainableTableHook,
        DatasetCheckHook,
        ProgressBarHook,
        TrainingGuardHook,
        ResumeCheckHook,
    )
    _run(cfg, ('train', 'val'), lambda runner: runner.train())


def _test(args: argparse.Namespace) -> None:
    cfg = _load_config(args)
    _require(cfg, 'test_dataloader', 'test_cfg', 'test_evaluator')
    _check_file(args.checkpoint, 'checkpoint')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        _set_visualization(cfg, args)
    if args.tta:
        _set_test_time_augmentation(cfg)
    if args.out is not None:
        _check_out(cfg.default_scope, args.out)
        if cfg.default_scope == 'mmseg':
            _set_segmentation_output(cfg, args.out)

    def run(runner: Runner) -> None:
        if args.out is not None and cfg.default_scope == 'mmdet':
            from mmdet.evaluation import DumpDetResults

            runner.test_evaluator.metrics.append(
                DumpDetResults(out_file_path=args.out)
            )
        elif args.out is not None and cfg.default_scope == 'mmpretrain':
            runner.test_evaluator.metrics.append(
                DumpResults(out_file_path=args.out)
            )
        runner.test()

    _add_hooks(cfg, DatasetCheckHook)
    _run(cfg, ('test',), run)


def _load_config(args: argparse.Namespace) -> Config:
    """The config with what both tools override."""
    if not osp.isfile(args.config):
        raise ConfigError(f'{args.config}: no such config file.')
    try:
        cfg = Config.fromfile(args.config)
    except (FileNotFoundError, ModuleNotFoundError, SyntaxError) as e:
        # A missing `_base_` file or framework, or a slip of the pen.
        raise ConfigError(f'{args.config} cannot be read: {e}') from e
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    scope = cfg.get('default_scope')
    if scope not in FRAMEWORKS:
        raise ConfigError(
            f'`default_scope` in the config should be one of '
            f'{tuple(FRAMEWORKS)}, but got {scope!r}.'
        )
    if importlib.util.find_spec(scope) is None:
        raise ConfigError(
            f'{args.config} is a config of {scope}, which is not installed. '
            f'Install it: pip install {FRAMEWORKS[scope]}'
        )
    if scope == 'mmpretrain':
        _set_collating(cfg)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('./work_dirs', name)
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if cfg.launcher == 'pytorch':
        if 'RANK' not in os.environ:
            raise ConfigError(
                '--launcher pytorch is for processes started by torchrun: '
                'torchrun --nproc_per_node=N '
                f'{sys.argv[0]} {args.config} --launcher pytorch ...'
            )
        if get_device() == 'cpu':
            _prepare_cpu_processes(cfg)
    elif cfg.launcher == 'slurm':
        if 'SLURM_PROCID' not in os.environ:
            raise ConfigError(
                '--launcher slurm is for processes started by srun; '
                'tools/slurm_train.sh and tools/slurm_test.sh start them.'
            )
        if get_device() == 'cpu':
            _set_slurm_variables()
            _prepare_cpu_processes(cfg)
    return cfg


def _set_collating(cfg: Config) -> None:
    """What mmpretrain's own tools set: batches are stacked by the loader."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name].setdefault('collate_fn', dict(type='default_collate'))


def _prepare_cpu_processes(cfg: Config) -> None:
    """Let several processes train without an accelerator.

    mmengine would set a CUDA device for any backend, unless the group is
    there already, and name device ids that only an accelerator has.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    if wrapper['type'] == 'MMDistributedDataParallel':
        wrapper['type'] = 'GlooDistributedDataParallel'
    cfg.model_wrapper_cfg = wrapper


@MODEL_WRAPPERS.register_module()
class GlooDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper with BN in place of SyncBN, which gloo lacks.

    Args:
        module (nn.Module): The model.
        **kwargs: Those of MMDistributedDataParallel.
    """

    def __init__(self, module, **kwargs):
        kept = set(module.modules())
        module = revert_sync_batchnorm(module)
        converted = len(set(module.modules()) - kept)
        if converted:
            print_log(
                f'SyncBN needs GPUs: {converted} layers run as BN, over the '
                'pictures of each process alone.',
                'current',
            )
        super().__init__(module, **kwargs)


def _set_slurm_variables() -> None:
    """Tell a process of srun what torchrun would tell it."""
    env = os.environ
    if 'MASTER_ADDR' not in env:
        names = subprocess.check_output(
            ['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']], text=True
        )
        env['MASTER_ADDR'] = names.split()[0]
    env.setdefault('MASTER_PORT', '29500')
    env.update(
        RANK=env['SLURM_PROCID'],
        WORLD_SIZE=env['SLURM_NTASKS'],
        LOCAL_RANK=env['SLURM_LOCALID'],
    )


def _require(cfg: Config, *keys: str) -> None:
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f'{cfg.filename} should set {", ".join(keys)}, but '
            f'{", ".join(missing)} is missing.'
        )


def _check_file(path: str, what: str) -> None:
    """Raise CheckpointError for a local file that is not there."""
    if '://' not in path and not osp.isfile(path):
        raise CheckpointError(f'{path}: no such {what} file.')


def _type_name(cfg: dict) -> str:
    """Name of a config's class, given as a string or as the class."""
    kind = cfg.get('type')
    if isinstance(kind, str):
        return kind.split('.')[-1]
    return getattr(kind, '__name__', '')  # none: mmengine says so


def _set_precision(cfg: Config, amp: bool) -> None:
    wrapper = cfg.optim_wrapper
    name = _type_name(wrapper) if 'type' in wrapper else 'OptimWrapper'
    if amp and name != 'AmpOptimWrapper':
        if name != 'OptimWrapper':
            raise ConfigError(
                '--amp needs `optim_wrapper.type` to be OptimWrapper, but got '
                f'{name}.'
            )
        name = wrapper.type = 'AmpOptimWrapper'
        wrapper.loss_scale = 'dynamic'
    if name == 'AmpOptimWrapper' and get_device() in ('cpu', 'mps'):
        raise ConfigError(
            f'{"--amp" if amp else "`optim_wrapper.type=AmpOptimWrapper`"} '
            f'needs an accelerator, but the device is {get_device()}. Leave '
            "out --amp and set `optim_wrapper.type='OptimWrapper'`."
        )


def _set_resume(cfg: Config, resume: str | None) -> None:
    if resume == 'auto':
        # Without a checkpoint to go on from, the start is as without the
        # flag: `load_from` still holds.
        cfg.resume = osp.isfile(osp.join(cfg.work_dir, 'last_checkpoint'))
        if cfg.resume:
            # None leaves it to mmengine, which fails if there is none.
            newest = newest_whole(Path(cfg.work_dir))
            cfg.load_from = newest and str(newest)
    elif resume is not None:
        _check_file(resume, 'checkpoint')
        cfg.resume = True
        cfg.load_from = resume


def _save_whole_files(cfg: Config) -> None:
    """Put our CheckpointHook, safe from kills, in the place of mmengine's."""
    cfg.default_hooks = cfg.get('default_hooks') or {}
    hook = cfg.default_hooks.get(
        'checkpoint', dict(type='CheckpointHook', interval=1)
    )
    if hook is not None and _type_name(hook) == 'CheckpointHook':
        cfg.default_hooks.checkpoint = dict(
            hook, type='e3va_mm.AtomicCheckpointHook'
        )


def _set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError(
            '--show and --show-dir need '
            "`default_hooks.visualization=dict(type='DetVisualizationHook')` "
            "(mmdet), `'SegVisualizationHook'` (mmseg) or "
            "`'VisualizationHook'` (mmpretrain) in the config."
        )
    if cfg.default_scope == 'mmpretrain':
        hook.enable = True
        hook.out_dir = args.show_dir
    else:
        hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir and cfg.default_scope == 'mmdet':
        hook.test_out_dir = args.show_dir
    elif args.show_dir and cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = args.show_dir


def _set_test_time_augmentation(cfg: Config) -> None:
    """Wrap the model; detectors without a recipe get mmdet's default."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.default_scope == 'mmseg':
        _require(cfg, 'tta_model', 'tta_pipeline')
    elif cfg.default_scope == 'mmpretrain':
        cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA'))
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        *steps, pack = dataset.pipeline
        cfg.setdefault(
            'tta_pipeline',
            [
                *copy.deepcopy(steps),
                dict(type='TestTimeAug', transforms=[flips, [pack]]),
            ],
        )
    else:
        cfg.setdefault(
            'tta_model',
            dict(
                type='DetTTAModel',
                tta_cfg=dict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
                ),
            ),
        )
        if 'tta_pipeline' not in cfg:
            keys = (
                'img_id',
                'img_path',
                'ori_shape',
                'img_shape',
                'scale_factor',
                'flip',
                'flip_direction',
            )
            flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
            pack = dict(type='PackDetInputs', meta_keys=keys)
            cfg.tta_pipeline = [
                *copy.deepcopy(dataset.pipeline[:-1]),
                dict(type='TestTimeAug', transforms=[flips, [pack]]),
            ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def _check_out(scope: str, out: str) -> None:
    is_pickle = out.endswith(('.pkl', '.pickle'))
    if scope != 'mmseg' and not is_pickle:
        kind = 'detector' if scope == 'mmdet' else 'classifier'
        raise ConfigError(
            f'--out of a {kind} should end in .pkl or '
            f'.pickle, but got {out!r}.'
        )
    if scope == 'mmseg' and (is_pickle or osp.isfile(out)):
        raise ConfigError(
            f'--out of a segmentor should be a directory, but got {out!r}.'
        )


def _set_segmentation_output(cfg: Config, out: str) -> None:
    evaluators = cfg.test_evaluator
    for evaluator in (
        [evaluators] if isinstance(evaluators, dict) else evaluators
    ):
        evaluator['output_dir'] = out
        evaluator['keep_results'] = True


def _add_hooks(cfg: Config, *hooks: type) -> None:
    """Add hooks of ours that the config does not name itself."""
    own = cfg.get('custom_hooks') or []
    named = {_type_name(hook) for hook in own}
    added = [
        dict(type=f'e3va_mm.{hook.__name__}')
        for hook in hooks
        if hook.__name__ not in named
    ]
    cfg.custom_hooks = [*own, *added]


def _run(cfg: Config, modes: Sequence[str], run: Callable) -> None:
    """Build the runner and run it; leave the terminal as it was."""
    runner = None
    try:
        runner = (
            RUNNERS.build(cfg)
            if 'runner_type' in cfg
            else Runner.from_cfg(cfg)
        )
        run(runner)
    except Exception as e:
        if not _data_checked(runner):
            explain_data_failure(cfg, modes, e)
        elif _mendable(e) is None:
            _check_disk(cfg.work_dir, e)
            for hook in runner.hooks:
                if isinstance(hook, DatasetCheckHook):
                    check_batch(hook.batch, e)
        raise
    finally:
        for hook in runner.hooks if runner else ():
            if isinstance(hook, ProgressBarHook):
                hook.stop()


def _check_disk(folder: str, error: BaseException | None) -> None:
    """Raise CheckpointError for a disk that had no room for something."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise CheckpointError(
                f'No room for the files of a run (work_dir {folder}'
                f'{", file " + str(error.filename) if error.filename else ""}'
                f'): {error}. Checkpoints that last_checkpoint names are '
                'whole. Make room, or set `work_dir` to a folder with room, '
                'and go on with --resume.'
            ) from error
        error = error.__cause__ or error.__context__


def _data_checked(runner: Runner | None) -> bool:
    return runner is None or any(
        isinstance(hook, DatasetCheckHook) and hook.passed
        for hook in runner.hooks
    )
