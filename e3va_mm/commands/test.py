"""Test a detector, segmentor or classifier by its config."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS
from mmengine.runner import Runner

from e3va_mm.commands import launching
from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.loaders import whole_checkpoint
from e3va_mm.frameworks.memory import keep_freed_memory

# As in the frameworks' own tools, where a config has none.
TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    mmpretrain=dict(type='AverageClsScoreTTA'),
)
# Where models of mmdet predict masks.
MASK_HEADS = 'mask_head', 'panoptic_head', 'panoptic_fusion_head'


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va test``; arguments and result as of ``train.main``."""
    parser = argparse.ArgumentParser('e3va test', description=__doc__)
    launching.add_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help='a checkpoint or an adapter file')
    add('--out', help='for predictions: a .pkl file, for mmseg a folder')
    add('--show', action='store_true', help='show predictions in a window')
    add('--show-dir', help='folder for drawn predictions')
    add('--wait-time', type=float, default=2, help='interval of --show (s)')
    add('--tta', action='store_true', help='test time augmentation')
    args = parser.parse_args(argv)
    keep_freed_memory()
    return launching.exit_code(_test, args)


def _test(args: argparse.Namespace) -> None:
    config = launching.load_config(
        args, 'test_dataloader', 'test_cfg', 'test_evaluator'
    )
    launching.check_checkpoint(args.checkpoint)
    config.load_from = args.checkpoint
    config.resume = False
    if args.show or args.show_dir:
        _set_visualization(config, args)
    if args.tta:
        _set_tta(config)
    if args.out is not None:
        _set_out(config, args.out)

    def run(runner: Runner) -> None:
        if args.out is not None and config.default_scope != 'mmseg':
            detects = config.default_scope == 'mmdet'
            kind = 'DumpDetResults' if detects else 'DumpResults'
            dump = METRICS.build(dict(type=kind, out_file_path=args.out))
            runner.test_evaluator.metrics.append(dump)
        with whole_checkpoint(args.checkpoint):
            runner.test()

    launching.run(config, ('test',), run, args.skip_check)


def _set_visualization(config: Config, args: argparse.Namespace) -> None:
    hook = (config.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ConfigError(
            '--show and --show-dir need a hook in the config, as in the '
            "framework's own: `default_hooks.visualization=dict(type=...)`."
        )
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if config.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=args.show_dir)
    elif config.default_scope == 'mmseg':
        hook.draw = True
        if args.show_dir:
            config.visualizer.save_dir = args.show_dir
    else:
        hook.update(enable=True, out_dir=args.show_dir)


def _set_tta(config: Config) -> None:
    """Wrap the model; models without a recipe get their framework's own."""
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    masks = [key for key in MASK_HEADS if _has(config.model, key)]
    if masks and 'tta_model' not in config and config.default_scope == 'mmdet':
        raise ConfigError(
            f'--tta merges boxes alone, but the model predicts masks '
            f'({masks[0]}). Test it without --tta, or set `tta_model` '
            'and `tta_pipeline` to a class of yours that merges masks.'
        )
    if config.default_scope in TTA_MODELS:
        *steps, pack = copy.deepcopy(dataset.pipeline)
        if config.default_scope == 'mmdet':
            pack = dict(type='PackDetInputs')  # with flips in its meta keys
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        augment = dict(type='TestTimeAug', transforms=[flips, [pack]])
        config.setdefault('tta_model', TTA_MODELS[config.default_scope])
        config.setdefault('tta_pipeline', [*steps, augment])
    launching.require(config, 'tta_model', 'tta_pipeline')
    config.model = ConfigDict(**config.tta_model, module=config.model)
    dataset.pipeline = config.tta_pipeline


def _has(node: object, key: str) -> bool:
    """Whether a config sets a key, itself or in what it holds."""
    return isinstance(node, Mapping) and (
        bool(node.get(key)) or any(_has(each, key) for each in node.values())
    )


def _set_out(config: Config, out: str) -> None:
    is_pickle = out.endswith(('.pkl', '.pickle'))
    if config.default_scope != 'mmseg':
        if not is_pickle:
            raise ConfigError(
                f'--out should end in .pkl or .pickle, but got {out!r}.'
            )
    elif is_pickle or Path(out).is_file():
        raise ConfigError(
            f'--out of a segmentor should be a folder, but got {out!r}.'
        )
    else:
        metrics = config.test_evaluator
        for metric in [metrics] if isinstance(metrics, dict) else metrics:
            metric.update(output_dir=out, keep_results=True)
