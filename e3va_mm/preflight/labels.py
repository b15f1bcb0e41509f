"""Checks of labels and masks."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from mmengine.config import Config

from e3va_mm.preflight.evaluation import evaluators
from e3va_mm.preflight.problems import Problem, Problems, warning
from e3va_mm.preflight.reading import Datasets, ReadDataset, for_each, quoted
from e3va_mm.utils.configs import class_name, configs_in
from e3va_mm.utils.listing import listed


def check_labels(config: Config, datasets: Datasets) -> Problems:
    """Find classes of which a loader has no sample, and loaders without any.

    Data sets that are joined count together; those without annotations, or
    whose classes are divided in things and stuff, do not count.
    """
    groups: dict[tuple, list[ReadDataset]] = {}
    for each in datasets.values():
        if each.classes and 'thing_classes' not in each.metainfo:
            groups.setdefault((each.loader, each.classes), []).append(each)
    for (loader, classes), members in groups.items():
        counts: Counter = Counter()
        looked = total = 0
        for each in members:
            samples = each.map_values if each.has_maps else each.entries
            for pixels in each.map_values.values():
                counts.update(v for v in pixels if isinstance(v, int))
            for entry in each.entries:
                counts.update(entry.labels)
            looked, total = looked + len(samples), total + len(each)
        if not looked:
            continue
        absent = [n for i, n in enumerate(classes) if not counts[i]]
        where, which = members[0].option, 'no sample'
        if looked < total:
            which = f'none of {looked:,} samples, of {total:,},'
        hint = _other_names(members, classes) if absent else ''
        values = [*map(str, sorted(counts))]
        if values and members[0].has_maps:
            hint += (
                f'The maps hold {listed(values, 20)} after '
                f'reduce_zero_label={members[0].dataset.reduce_zero_label}. '
            )
        fault = f'{which} has the class {quoted(absent)}'
        expected = f'samples of all {len(classes)} classes'
        severity = 'warning'
        if len(absent) == len(classes) and _is_scored(config, loader):
            fault = f'{which} has a label of its classes ({quoted(classes)})'
            expected = 'at least one'
            severity = 'error' if looked == total else 'warning'
        if absent:
            yield Problem(
                where,
                fault,
                expected,
                f'{hint}Correct the annotations or {where}.metainfo, if that '
                'is not meant.',
                severity=severity,
            )


@for_each
def check_map_values(config: Config, dataset: ReadDataset) -> Problems:
    """Find values in segmentation maps that no class has."""
    if not dataset.classes or not dataset.is_stock:
        return
    if (
        dataset.has_maps
        and dataset.transform('LoadAnnotations')
        and any('seg_map_path' not in e.paths for e in dataset.entries)
    ):
        yield Problem(
            f'{dataset.option}.data_prefix.seg_map_path',
            'not set, but LoadAnnotations of its pipeline reads maps',
            'the folder of the maps',
            'Set it, or take LoadAnnotations out of a test without maps.',
        )
    count, ignored = len(dataset.classes), _ignored(config, dataset)
    known = {*range(count), *ignored}
    for path, counts in dataset.map_values.items():
        (first, *_) = counts
        values = [str(v) for v in counts if v not in known]
        if isinstance(first, tuple):
            yield Problem(
                f'{dataset.option}: {path}',
                f'the map has the shape {first}',
                f'{first[:2]}, one number for each pixel',
                'Give maps of numbers of classes, not of colours.',
            )
        elif values:
            yield Problem(
                f'{dataset.option}: {path}',
                f'the map has values that no class has: {listed(values, 5)}',
                f'0 to {count - 1} for the {count} classes and '
                f'{sorted(ignored)} for none',
                f'Correct the maps, or {dataset.option}.metainfo or '
                '.reduce_zero_label, or `ignore_index` of all heads and of '
                'the evaluator.',
            )


@for_each
def check_masks(config: Config, dataset: ReadDataset) -> Problems:
    """Find instances without a mask where the pipeline loads masks."""
    found = [(e, *fault) for e in dataset.entries for fault in e.masks]
    ids = _annotation_ids(dataset) if found else {}
    for entry, box, fault, severity in found:
        image = entry.paths.get('img_path')
        name = ids.get(_key(entry.id, box), f'of {image}')
        yield Problem(
            str(dataset.get('ann_file') or image),
            f'segmentation of annotation {name} {fault}',
            'a list of polygons, or an RLE of the size of its image',
            'Correct the annotations; or, for a detector of boxes alone, '
            f'set with_mask=False in LoadAnnotations of {dataset.option}'
            '.pipeline.',
            severity,
        )


@for_each
def check_boxes(config: Config, dataset: ReadDataset) -> Problems:
    """Find boxes without area, for which some losses are infinite.

    mmdet leaves them out of files in COCO's format, but of no other.
    """
    entries = dataset.entries if dataset.mode == 'train' else ()
    boxes = [(e.paths, box) for e in entries for box in e.flat_boxes]
    for paths, box in boxes:
        yield warning(
            paths.get('xml_path') or paths.get('img_path', dataset.option),
            f'the box {box} (x1, y1, x2, y2) has no area',
            'x1 < x2 and y1 < y2',
            'The loss can become infinite. Correct the box, or set '
            f'{dataset.option}.filter_cfg=dict(bbox_min_size=1), by which '
            'XMLDataset ignores it.',
        )


def _annotation_ids(dataset: ReadDataset) -> dict[tuple, str]:
    """The ids of annotations in a COCO-like file, by image and box."""
    try:
        return {
            _key(entry['image_id'], _corners(entry['bbox'])): (
                f'{entry["id"]} (image {entry["image_id"]})'
            )
            for entry in dataset.annotations()['annotations']
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
    paths = (e.paths.get('xml_path') for each in members for e in each.entries)
    for path in filter(None, paths):
        try:
            root = ElementTree.parse(path)
        except OSError:  # on other storage
            continue
        names.update(name.text for name in root.iterfind('object/name'))
    others = [name for name, _ in names.most_common() if name not in classes]
    return f'The files name {quoted(others)}. ' if others else ''


def _is_scored(config: Config, loader: str) -> bool:
    """Whether figures or a loss come of the labels."""
    return not loader.startswith('test') or not all(
        each.get('format_only') or class_name(each).startswith('Dump')
        for _, each, mode in evaluators(config)
        if mode == 'test'
    )


def _ignored(config: Config, dataset: ReadDataset) -> set[int]:
    """Values of maps that losses, or a validation's metrics, leave out."""
    if dataset.mode == 'train':
        model = config.get('model') or {}
        keys = 'decode_head', 'auxiliary_head'
        readers = [head for key in keys for head in configs_in(model.get(key))]
        known = bool(readers)
    else:
        readers = [e for _, e, m in evaluators(config) if m == dataset.mode]
        known = all(class_name(each) == 'IoUMetric' for each in readers)
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
