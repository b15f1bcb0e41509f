"""Checks of labels and masks."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from mmengine.config import Config
from mmengine.fileio import load

from e3va_mm.preflight.problems import Problem
from e3va_mm.preflight.reading import ReadDataset, quoted
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.listing import listed


def check_labels(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find classes of which a loader has no sample, and loaders without any.

    Data sets that are joined count together; those without annotations, or
    whose classes are divided in things and stuff, do not count.
    """
    groups: dict[tuple, list[ReadDataset]] = {}
    for each in datasets.values():
        if each.classes and 'thing_classes' not in each.metainfo:
            groups.setdefault((each.loader, each.classes), []).append(each)
    for (loader, classes), members in groups.items():
        counts, looked, total = Counter(), 0, 0
        for each in members:
            has_maps = hasattr(each.dataset, 'reduce_zero_label')
            values = each.map_values if has_maps else {}
            for pixels in values.values():
                counts.update(v for v in pixels if isinstance(v, int))
            looked += len(values) if has_maps else len(each.entries)
            total += len(each)
            counts.update(each.labels)
        if not looked:
            continue
        absent = [n for i, n in enumerate(classes) if not counts[i]]
        where, which = members[0].option, 'no sample'
        if looked < total:
            which = f'none of {looked:,} samples, of {total:,},'
        hint = _other_names(members, classes) if absent else ''
        values = [*map(str, sorted(counts))]
        if values and hasattr(members[0].dataset, 'reduce_zero_label'):
            hint += (
                f'The maps hold {listed(values, 20)} after '
                f'reduce_zero_label={members[0].dataset.reduce_zero_label}. '
            )
        if len(absent) == len(classes) and _is_scored(config, loader):
            yield Problem(
                where,
                f'{which} has a label of its classes ({quoted(classes)})',
                'at least one',
                f'{hint}Correct the annotations or {where}.metainfo.',
                severity='error' if looked == total else 'warning',
            )
        elif absent:
            yield Problem(
                where,
                f'{which} has the class {quoted(absent)}',
                f'samples of all {len(classes)} classes',
                f'{hint}Correct the annotations or {where}.metainfo, if that '
                'is not meant.',
                severity='warning',
            )


def check_map_values(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find values in segmentation maps that no class has."""
    for each in datasets.values():
        if not each.classes or not each.is_stock:
            continue
        if (
            hasattr(each.dataset, 'reduce_zero_label')
            and each.transform('LoadAnnotations')
            and any('seg_map_path' not in e.paths for e in each.entries)
        ):
            yield Problem(
                f'{each.option}.data_prefix.seg_map_path',
                'not set, but LoadAnnotations of its pipeline reads maps',
                'the folder of the maps',
                'Set it, or take LoadAnnotations out of a test without maps.',
            )
        count, ignored = len(each.classes), _ignored(config, each)
        known = {*range(count), *ignored}
        for path, counts in each.map_values.items():
            (first, *_) = counts
            if isinstance(first, tuple):
                yield Problem(
                    f'{each.option}: {path}',
                    f'the map has the shape {first}',
                    f'{first[:2]}, one number for each pixel',
                    'Give maps of numbers of classes, not of colours.',
                )
                continue
            values = [str(v) for v in sorted(counts) if v not in known]
            if values:
                yield Problem(
                    f'{each.option}: {path}',
                    'the map has values that no class has: '
                    f'{listed(values, 5)}',
                    f'0 to {count - 1} for the {count} classes and '
                    f'{sorted(ignored)} for none',
                    f'Correct the maps, or {each.option}.metainfo or '
                    '.reduce_zero_label, or `ignore_index` of all heads and '
                    'of the evaluator.',
                )


def check_masks(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find instances without a mask where the pipeline loads masks."""
    for each in datasets.values():
        if not (each.entries and each.masks):
            continue
        source = each.get('ann_file')
        ids = _annotation_ids(each)
        for entry, box, fault, severity in each.masks:
            image = entry.paths.get('img_path')
            name = ids.get(_key(entry.id, box), 'of ' + str(image))
            yield Problem(
                str(source or image),
                f'segmentation of annotation {name} {fault}',
                'a list of polygons, or an RLE of the size of its image',
                'Correct the annotations; or, for a detector of boxes alone, '
                f'set with_mask=False in LoadAnnotations of {each.option}'
                '.pipeline.',
                severity=severity,
            )


def check_boxes(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find boxes without area, for which some losses are infinite.

    mmdet leaves them out of files in COCO's format, but of no other.
    """
    for each in datasets.values():
        if not each.entries or not each.loader.startswith('train'):
            continue
        for entry, box in each.flat_boxes:
            paths = entry.paths
            yield Problem(
                paths.get('xml_path') or paths.get('img_path', each.option),
                f'the box {box} (x1, y1, x2, y2) has no area',
                'x1 < x2 and y1 < y2',
                'The loss can become infinite. Correct the box, or set '
                f'{each.option}.filter_cfg=dict(bbox_min_size=1), by which '
                'XMLDataset ignores it.',
                severity='warning',
            )


def _annotation_ids(dataset: ReadDataset) -> dict[tuple, str]:
    """The ids of annotations in a COCO-like file, by image and box."""
    try:
        content = load(
            dataset.get('ann_file'), backend_args=dataset.get('backend_args')
        )
        return {
            _key(entry['image_id'], _corners(entry['bbox'])): (
                f'{entry["id"]} (image {entry["image_id"]})'
            )
            for entry in content['annotations']
        }
    except Exception:  # Of another format.
        return {}


def _corners(box: list) -> list:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _key(image: Any, box: list | None) -> tuple:
    return str(image), tuple(box or ())


def _other_names(members: list[ReadDataset], classes: tuple) -> str:
    """Names in XML files that are no class, a sentence."""
    names: Counter = Counter()
    for each in members:
        for entry in each.entries:
            if 'xml_path' in entry.paths:
                try:
                    root = ElementTree.parse(entry.paths['xml_path'])
                except OSError:  # on other storage
                    continue
                names.update(
                    name.text for name in root.iterfind('object/name')
                )
    others = [name for name, _ in names.most_common() if name not in classes]
    return f'The files name {quoted(others)}. ' if others else ''


def _is_scored(config: Config, loader: str) -> bool:
    """Whether figures or a loss come of the labels."""
    if not loader.startswith('test'):
        return True
    evaluators = config.get('test_evaluator') or []
    if isinstance(evaluators, Mapping):
        evaluators = [evaluators]
    return not all(
        each.get('format_only') or class_name(each).startswith('Dump')
        for each in evaluators
    )


def _ignored(config: Config, dataset: ReadDataset) -> set[int]:
    """Values of maps that losses, or a validation's metrics, leave out."""
    if not dataset.loader.startswith('train'):
        option = dataset.loader.replace('dataloader', 'evaluator')
        readers = config.get(option) or []
        readers = [readers] if isinstance(readers, Mapping) else readers
        known = all(class_name(each) == 'IoUMetric' for each in readers)
    else:
        model = config.get('model') or {}
        readers = []
        for key in ('decode_head', 'auxiliary_head'):
            heads = model.get(key) or []
            readers += [heads] if isinstance(heads, Mapping) else heads
        known = bool(readers)
    if not known:
        own = dataset.get('ignore_index', 255)
        return {own, *_values(config.get('model'), 'ignore_index')}
    values = [{each.get('ignore_index', 255)} for each in readers]
    return set.intersection(*values) if values else {255}


def _values(node: Any, name: str) -> Iterator[int]:
    """Whole numbers under a name, anywhere in a config."""
    if isinstance(node, Mapping):
        if isinstance(node.get(name), int):
            yield node[name]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _values(each, name)
