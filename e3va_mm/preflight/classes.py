"""Checks of classes: those of the data, of annotation files and of heads."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.fileio import load
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.preflight.problems import Problem
from e3va_mm.preflight.reading import ReadDataset, quoted

# Where `num_classes` does not count the classes of the data set: trunks and
# their classifiers, class-agnostic proposals, stuff maps, edge maps, losses.
OTHER_CLASSES = ('backbone', 'rpn_head', 'semantic_head', 'loss')
OTHER_CLASSES_TYPES = ('RPNHead', 'GARPNHead', 'STDCHead')


def check_class_names(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find names of classes that are a string instead of a tuple."""
    for option, dataset in datasets.items():
        classes = dataset.metainfo.get('classes')
        if isinstance(classes, str):
            yield Problem(
                f'{option}.metainfo',
                f"classes is the string '{classes}'",
                'a tuple of names',
                f"For a single class write classes=('{classes}', ), with a "
                'comma.',
                error=ConfigError,
            )


def check_categories(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Compare the classes with the categories of a COCO-like file.

    mmdet leaves out a class without a category in silence, and shifts the
    labels of those after it. It numbers labels in the order of the file,
    whatever the order of the classes.
    """
    for option, dataset in datasets.items():
        labels = dataset.get('cat2label')
        ids = dataset.get('cat_ids')
        # XMLDataset has labels by name and no file of categories.
        if ids is None or not isinstance(labels, Mapping):
            continue
        classes = dataset.classes
        content = load(
            dataset.get('ann_file'), backend_args=dataset.get('backend_args')
        )
        names = [category['name'] for category in content['categories']]
        where, file = f'{option}.ann_file', dataset.get('ann_file')
        advice = f'Set {option}.metainfo=dict(classes=(...)) to names of the '
        # The ids are those of the categories whose name is a class.
        if len(ids) != len(classes):
            wrong = [name for name in classes if name not in names]
            what = f'no category for {len(wrong)} of {len(classes)} classes'
            if not wrong:
                what = 'several categories of the same name'
                wrong = [name for name in classes if names.count(name) > 1]
            yield Problem(
                where,
                f'{file} has {what}: {quoted(wrong)} (its categories: '
                f'{quoted(names)})',
                'one category for each class of the data set: '
                f'{quoted(classes)}',
                f'{advice}file.',
            )
            continue
        by_id = {each['id']: each['name'] for each in content['categories']}
        ordered = [by_id.get(i) for i in sorted(labels, key=labels.get)]
        if Counter(ordered) == Counter(classes) and ordered != [*classes]:
            yield Problem(
                where,
                f'{file} numbers its labels as {quoted(ordered)}, in the '
                'order of its categories',
                f'the order of the classes, {quoted(classes)}',
                f'{advice}file in its order.',
            )


def check_same_classes(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find data sets whose labels have other names than those of the first.

    Joined data sets should have the same classes; those of training and of
    validation may differ, where the model reads names.
    """
    firsts: dict[str, ReadDataset] = {}  # one for each task
    for each in datasets.values():
        _, _, task = each.option.rpartition('.tasks.')
        task = task.partition('.')[0] if '.tasks.' in each.option else ''
        first = firsts.setdefault(task, each)
        if not each.classes or not first.classes:
            continue
        same_names = Counter(each.classes) == Counter(first.classes)
        joined = each.loader == first.loader
        if each.classes == first.classes or not (
            joined or len(each.classes) == len(first.classes)
        ):
            continue
        yield Problem(
            f'{each.option}.metainfo',
            f'the classes are {quoted(each.classes)}',
            f'those of {first.option}, {quoted(first.classes)}, in their '
            'order',
            'The same label would have another name. Set the same '
            '`metainfo` for both.',
            severity='error' if same_names or joined else 'warning',
        )


def check_not_empty(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Find data sets without an image, or with none left by filters."""
    for option, dataset in datasets.items():
        if len(dataset) == 0:
            prefix = dataset.get('data_prefix', {})
            source = dataset.get('ann_file') or str(prefix or 'its source')
            found = f'the data set is empty, no image of {source} is left'
            advice = (
                f'Look at {source} and at {option}.filter_cfg '
                f'({dataset.get("filter_cfg")}).'
            )
            suffix, folder = dataset.get('img_suffix'), prefix.get('img_path')
            others = _endings(folder) if suffix and folder else Counter()
            if others and suffix not in others:
                count = ', '.join(f'{n} {e}' for e, n in others.most_common(3))
                found = f'no file in {folder} ends in {suffix}; there are '
                found += count
                advice = f'Set {option}.img_suffix.'
            yield Problem(
                option,
                found,
                'at least one with an annotation of one of its classes '
                f'({quoted(dataset.classes)})',
                advice,
            )


def check_heads(
    config: Config, datasets: Mapping[str, ReadDataset], model: nn.Module
) -> Iterator[Problem]:
    """Compare every head's ``num_classes`` with the classes of the data.

    Left out are models of open vocabulary (``language_model``), panoptic data,
    whose heads divide the classes among them, data sets that differ in their
    number of classes or state none, and masks without classes.
    """
    # Training and validation may differ in their classes.
    for loader in dict.fromkeys(each.loader for each in datasets.values()):
        own = {o: d for o, d in datasets.items() if d.loader == loader}
        if not hasattr(model, 'tasks'):
            yield from _check_heads(config, own, model)
            continue
        for name, task in model.tasks.items():
            # LOADER.dataset.tasks.NAME...
            part = {o: d for o, d in own.items() if o.split('.')[3] == name}
            yield from _check_heads(config, part, task)


def _check_heads(
    config: Config, datasets: Mapping[str, ReadDataset], model: nn.Module
) -> Iterator[Problem]:
    counts = {len(dataset.classes) for dataset in datasets.values()}
    if (
        len(counts) != 1
        or 0 in counts
        or hasattr(model, 'language_model')
        or any('thing_classes' in d.metainfo for d in datasets.values())
    ):
        return
    (expected,) = counts
    data, dataset = next(iter(datasets.items()))
    wrong = {}  # several heads may come from one option
    for name, module in model.named_modules():
        received = getattr(module, 'num_classes', None)
        if (
            name
            and isinstance(received, int)
            and received != expected
            and not getattr(module, 'class_agnostic', False)
            and type(module).__name__ not in OTHER_CLASSES_TYPES
            and not any(
                part.startswith(OTHER_CLASSES) for part in name.split('.')
            )
        ):
            wrong[_option(name, module, config)] = received
    for option, received in wrong.items():
        yield Problem(
            option,
            f'received {received}',
            f'{expected}, the classes of {data} ({quoted(dataset.classes)})',
            'Set these options in the config or by --cfg-options; or, if the '
            f'classes are not yours, set {data}.metainfo=dict(classes=(...)).',
            error=ConfigError,
        )


def check_class_weights(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Compare the weights of segmentors' losses with the classes of heads."""
    model = config.get('model') or {}
    for key in ('decode_head', 'auxiliary_head'):
        for head in _listed(model.get(key)):
            for loss in _listed(head.get('loss_decode')):
                count, weights = (
                    head.get('num_classes'),
                    loss.get('class_weight'),
                )
                if isinstance(weights, Sequence) and not (
                    isinstance(weights, str) or len(weights) == count
                ):
                    yield Problem(
                        f'model.{key}.loss_decode.class_weight',
                        f'{len(weights)} weights',
                        f'{count}, as num_classes',
                        'Give one weight for each class, or None.',
                        error=ConfigError,
                    )


def _listed(found: Any) -> list[Mapping]:
    found = found if isinstance(found, (list, tuple)) else [found]
    return [each for each in found if isinstance(each, Mapping)]


def _endings(folder: str) -> Counter:
    """How many files below a folder have which ending."""
    return Counter(
        os.path.splitext(name)[1]
        for _, _, names in os.walk(folder)
        for name in names
    )


def _option(name: str, module: nn.Module, config: Config) -> str:
    """The config option of the ``num_classes`` of a module.

    Heads repeated from one option (``roi_head.bbox_head.0``, ``.1``...) have
    no index there.
    """
    path, node = ['model'], config.get('model', {})
    node = node.get('module', node)  # inside of test time augmentation
    for part in name.split('.'):
        if part.isdigit():
            if not isinstance(node, Sequence):
                continue
            node = node[int(part)] if int(part) < len(node) else {}
        else:
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        path.append(part)
    option = 'num_classes'
    if hasattr(module, 'num_things_classes'):
        option = 'num_things_classes + num_stuff_classes'
    return '.'.join([*path, option])
