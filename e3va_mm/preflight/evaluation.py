"""Checks of evaluators, what they read and what they are asked for."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mmcv
from mmengine.config import Config
from mmengine.fileio import load

from e3va_mm.preflight.problems import Problem, Problems, option_problem
from e3va_mm.preflight.reading import Datasets, ReadDataset, for_each, quoted
from e3va_mm.utils.configs import class_name, configs_in

SEGMENTATION_METRICS = {
    'mIoU': ('mIoU', 'mAcc'),
    'mDice': ('mDice', 'mAcc'),
    'mFscore': ('mFscore', 'mPrecision', 'mRecall'),
}
# What leaves images at a size that can be told beforehand.
SIMPLE = {'LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackSegInputs'}


def check_evaluator_files(config: Config, datasets: Datasets) -> Problems:
    """Compare the annotations of evaluators with those of their data sets."""
    for option, evaluator, mode in evaluators(config):
        file = evaluator.get('ann_file')
        if not isinstance(file, str) or '://' in file:
            continue
        members = [d for d in datasets.values() if d.mode == mode]
        if not members:
            continue
        where = f'{option}.ann_file'
        advice = f'Set {where} to the file of {mode}_dataloader.dataset.'
        if not os.path.exists(file):
            yield Problem(where, f'no such file: {file}', 'a file', advice)
            continue
        if not file.endswith('.json'):
            continue
        content = load(file)
        if not isinstance(content, Mapping) or 'images' not in content:
            continue
        names = {i['id']: i.get('file_name') for i in content['images']}
        ours = {
            entry.id: entry.paths.get('img_path', '')
            for each in members
            for entry in each.entries
            if entry.id is not None
        }
        if not ours:
            continue
        data = f'{members[0].option} ({members[0].get("ann_file")})'
        unknown = [i for i in ours if i not in names]
        extra = [i for i in names if i not in ours]
        # One file, of which the data set may give a part.
        same = any(_is_same(file, d.get('ann_file')) for d in members)
        fault, severity = None, 'warning' if same else 'error'
        if unknown:
            fault = f'no image with the id {quoted(unknown)}'
        elif extra:
            fault = f'{len(extra):,} images that {data} does not give'
        elif not same:
            others = [i for i in ours if not _is_named(ours[i], names[i])]
            if others:
                fault = f'other names for {len(others):,} images'
            elif len(members) == 1 and _differ(content, members[0]):
                fault, severity = 'other annotations', 'warning'
        if fault:
            yield Problem(
                where,
                f'{file} has {fault}',
                f'the {len(ours):,} images of {data}',
                f'{advice} The figures would not be those of its images.',
                severity=severity,
            )
        metrics = evaluator.get('metric', 'bbox')
        if class_name(evaluator) == 'CocoMetric' and 'segm' in metrics:
            yield from _check_masks(where, file, content)


def _check_masks(where: str, file: str, content: Mapping) -> Problems:
    for entry in content.get('annotations', ()):
        if not entry.get('segmentation'):
            yield Problem(
                where,
                f'{file}: segmentation of annotation {entry.get("id")} '
                f'(image {entry.get("image_id")}) is missing or empty',
                "a mask, for metric='segm'",
                "Correct the annotations, or set metric='bbox'.",
            )


def check_metric_names(config: Config, datasets: Datasets) -> Problems:
    """Find metrics that the evaluators do not give."""
    patterns, known = [], bool(config.get('val_evaluator'))
    for option, evaluator, mode in evaluators(config):
        if class_name(evaluator) == 'IoUMetric':
            for metric in _listed(evaluator.get('iou_metrics')):
                if metric not in SEGMENTATION_METRICS:
                    yield option_problem(
                        f'{option}.iou_metrics',
                        f'{metric!r}',
                        quoted(SEGMENTATION_METRICS),
                        'Correct the name.',
                    )
        if mode == 'val':
            found = _patterns(evaluator)
            known = known and bool(found)
            patterns += found
    for option, key in _monitored(config) if known else ():
        if not any(re.fullmatch(pattern, key) for pattern in patterns):
            examples = [re.sub(r'\(([^|)]*).*', r'\1', p) for p in patterns]
            yield option_problem(
                option,
                f'{key!r}',
                'a metric that val_evaluator gives, such as '
                + quoted(each.replace('.*', '') for each in examples),
                'Correct the name; metrics bear the prefix of their '
                'evaluator.',
            )


def _patterns(evaluator: Mapping) -> list[str]:
    """What the names of an evaluator's metrics match; empty if not known."""
    kind, prefix = class_name(evaluator), evaluator.get('prefix')
    if kind == 'IoUMetric':
        names = ['aAcc']
        for metric in _listed(evaluator.get('iou_metrics')) or ['mIoU']:
            names += SEGMENTATION_METRICS.get(metric, ())
    elif kind == 'CocoMetric':
        prefix = prefix or 'coco'
        metrics = _listed(evaluator.get('metric')) or ['bbox']
        names = [rf'{metric}_(mAP.*|AR@.*)' for metric in metrics]
        names += ['.*_precision'] * bool(evaluator.get('classwise'))
        names += ['AR@.*'] * any(m.startswith('proposal') for m in metrics)
    elif kind == 'VOCMetric':
        prefix = prefix or 'pascal_voc'
        names = [r'(mAP|AP\d+|AR@.*|recall.*)']
    else:
        return []
    return [f'{prefix}/{name}' if prefix else name for name in names]


def _monitored(config: Config) -> Iterator[tuple[str, str]]:
    """Options that name metrics, and the metrics."""
    hooks = {
        f'{option}.{name}': hook
        for option, found in (
            ('default_hooks', (config.get('default_hooks') or {}).items()),
            ('custom_hooks', enumerate(config.get('custom_hooks') or ())),
        )
        for name, hook in found
        if isinstance(hook, Mapping)
    }
    for option, hook in hooks.items():
        for key in ('save_best', 'monitor'):
            for name in _listed(hook.get(key)):
                if name != 'auto':
                    yield f'{option}.{key}', name


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else [*(names or ())]


@for_each
def check_batch_sizes(config: Config, dataset: ReadDataset) -> Problems:
    """Find batches of a segmentor's test whose images differ in size."""
    model = config.get('model') or {}
    model = model.get('module', model)
    batch = (config.get(dataset.loader) or {}).get('batch_size', 1)
    kinds = {type(each).__name__ for each in dataset.transforms}
    if (
        (model.get('data_preprocessor') or {}).get('test_cfg')  # pads them
        or dataset.mode == 'train'
        or batch == 1
        or 'PackSegInputs' not in kinds
        or not kinds <= SIMPLE
    ):
        return
    sizes, resize = {}, dataset.transform('Resize')
    for entry in dataset.entries:
        path = entry.paths.get('img_path')
        size = dataset.size_read(path)
        if size:
            sizes.setdefault(_resized(size, resize), path)
    if len(sizes) > 1:
        (one, path), (other, second) = list(sizes.items())[:2]
        yield option_problem(
            f'{dataset.loader}.batch_size',
            f'received {batch}, but images reach the model with the sizes '
            f'{one} ({path}) and {other} ({second})',
            '1, or images of one size',
            f'Set {dataset.loader}.batch_size=1, or '
            'model.data_preprocessor.test_cfg=dict(size_divisor=32).',
        )


def _resized(size: tuple[int, int], resize: Any) -> tuple[int, int]:
    if resize is None:
        return size
    if resize.keep_ratio:
        return mmcv.rescale_size(size, resize.scale or resize.scale_factor)
    return size if resize.scale is None else tuple(resize.scale)


def evaluators(config: Config) -> Iterator[tuple[str, Mapping, str]]:
    """Options and configs of metrics, and the mode they are for."""
    for mode in ('val', 'test'):
        option, found = f'{mode}_evaluator', config.get(f'{mode}_evaluator')
        if isinstance(found, Mapping) and 'metrics' in found:
            option, found = f'{option}.metrics', found['metrics']
        for i, each in enumerate(configs_in(found)):
            where = option if isinstance(found, Mapping) else f'{option}.{i}'
            yield where, each, mode


def _is_named(path: str, name: str | None) -> bool:
    return not name or os.path.normpath(path).endswith(os.path.normpath(name))


def _differ(content: Mapping, dataset: ReadDataset) -> bool:
    """Whether annotations are not those of the file of a data set."""
    file = str(dataset.get('ann_file'))
    if not file.endswith('.json') or not os.path.exists(file):
        return False
    one, other = (
        Counter(
            (str(a.get('image_id')), a.get('category_id'), str(a.get('bbox')))
            for a in each.get('annotations', ())
        )
        for each in (content, load(file))
    )
    return one != other


def _is_same(one: str, other: str | None) -> bool:
    return bool(other) and os.path.realpath(one) == os.path.realpath(other)
