"""Checks of classes: those of the data, of annotation files and of heads."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from torch import nn

from e3va_mm.preflight.problems import Problem, Problems, option_problem
from e3va_mm.preflight.reading import Datasets, ReadDataset, for_each, quoted
from e3va_mm.utils.configs import configs_in

# Where `num_classes` does not count the classes of the data set: trunks and
# their classifiers, class-agnostic proposals, stuff maps, edge or depth maps,
# losses.
OTHER_CLASSES = ('backbone', 'rpn_head', 'semantic_head', 'loss')
OTHER_CLASSES_TYPES = ('RPNHead', 'GARPNHead', 'STDCHead', 'VPDDepthHead')


@for_each
def check_class_names(config: Config, dataset: ReadDataset) -> Problems:
    """Find names of classes that are a string instead of a tuple."""
    classes = dataset.metainfo.get('classes')
    if isinstance(classes, str):
        yield option_problem(
            f'{dataset.option}.metainfo',
            f"classes is the string '{classes}'",
            'a tuple of names',
            f"For a single class write classes=('{classes}', ), with a comma.",
        )


@for_each
def check_categories(config: Config, dataset: ReadDataset) -> Problems:
    """Compare the classes with the categories of a COCO-like file.

    mmdet leaves out a class without a category in silence, and shifts the
    labels of those after it. It numbers labels in the order of the file,
    whatever the order of the classes.
    """
    labels, ids = dataset.get('cat2label'), dataset.get('cat_ids')
    # XMLDataset has labels by name and no file of categories.
    if ids is None or not isinstance(labels, Mapping):
        return
    classes = dataset.classes
    categories = dataset.annotations()['categories']
    names = [each['name'] for each in categories]
    by_id = {each['id']: each['name'] for each in categories}
    ordered = [by_id.get(i) for i in sorted(labels, key=labels.get)]
    # The ids are those of the categories whose name is a class.
    if len(ids) != len(classes):
        wrong = [name for name in classes if name not in names]
        what = f'no category for {len(wrong)} of {len(classes)} classes'
        if not wrong:
            what = 'several categories of the same name'
            wrong = [name for name in classes if names.count(name) > 1]
        found = (
            f'has {what}: {quoted(wrong)} (its categories: {quoted(names)})'
        )
        expected = 'one category for each class of the data set: ' + quoted(
            classes
        )
        end = 'file.'
    elif Counter(ordered) == Counter(classes) and ordered != [*classes]:
        found = (
            f'numbers its labels as {quoted(ordered)}, in the order of its '
            'categories'
        )
        expected = f'the order of the classes, {quoted(classes)}'
        end = 'file in its order.'
    else:
        return
    yield Problem(
        f'{dataset.option}.ann_file',
        f'{dataset.get("ann_file")} {found}',
        expected,
        f'Set {dataset.option}.metainfo=dict(classes=(...)) to names of the '
        + end,
    )


def check_same_classes(config: Config, datasets: Datasets) -> Problems:
    """Find data sets whose labels have other names than those of another.

    Joined data sets should have the same classes, as many as each has; those
    of training and of validation may differ, where the model reads names.
    """
    firsts: dict[tuple[str, ...], ReadDataset] = {}
    for each in datasets.values():
        first = firsts.setdefault((each.task, each.loader), each)
        joined = first is not each
        if not joined:
            first = firsts.setdefault((each.task,), each)
        pairs = [*zip(each.classes, first.classes, strict=False)]
        same_names = Counter(each.classes) == Counter(first.classes)
        if all(one == other for one, other in pairs) or not (
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


@for_each
def check_not_empty(config: Config, dataset: ReadDataset) -> Problems:
    """Find data sets without an image, or with none left by filters."""
    if len(dataset) > 0:
        return
    prefix = dataset.get('data_prefix', {})
    source = dataset.get('ann_file') or str(prefix or 'its source')
    found = f'the data set is empty, no image of {source} is left'
    advice = (
        f'Look at {source} and at {dataset.option}.filter_cfg '
        f'({dataset.get("filter_cfg")}).'
    )
    suffix, folder = dataset.get('img_suffix'), prefix.get('img_path')
    others = _endings(folder) if suffix and folder else Counter()
    if others and suffix not in others:
        count = ', '.join(f'{n} {end}' for end, n in others.most_common(3))
        found = f'no file in {folder} ends in {suffix}; there are {count}'
        advice = f'Set {dataset.option}.img_suffix.'
    yield Problem(
        dataset.option,
        found,
        'at least one with an annotation of one of its classes '
        f'({quoted(dataset.classes)})',
        advice,
    )


def check_heads(
    config: Config, datasets: Datasets, model: nn.Module
) -> Problems:
    """Compare every head's ``num_classes`` with the classes of the data.

    Left out are models of open vocabulary (``language_model``), panoptic data,
    whose heads divide the classes among them, data sets that differ in their
    number of classes or state none, and masks without classes.
    """
    # Training and validation may differ in their classes, and so may tasks.
    groups: dict[tuple[str, str], list[ReadDataset]] = {}
    for each in datasets.values():
        groups.setdefault((each.loader, each.task), []).append(each)
    parts = getattr(model, 'tasks', {'': model})
    for (_, task), group in groups.items():
        if task in parts:
            yield from _check_heads(config, group, parts[task])


def _check_heads(
    config: Config, datasets: Sequence[ReadDataset], model: nn.Module
) -> Problems:
    dataset, expected = datasets[0], len(datasets[0].classes)
    if (
        not expected
        or any(len(each.classes) != expected for each in datasets)
        or hasattr(model, 'language_model')
        or any('thing_classes' in each.metainfo for each in datasets)
    ):
        return
    wrong = {}  # several heads may come from one option
    for name, module in model.named_modules():
        received = getattr(module, 'num_classes', None)
        if (
            name
            and isinstance(received, int)
            and received != expected
            and not getattr(module, 'class_agnostic', False)
            and getattr(module, 'to_onehot', True)  # of a preprocessor
            and type(module).__name__ not in OTHER_CLASSES_TYPES
            and not any(
                part.startswith(OTHER_CLASSES) for part in name.split('.')
            )
        ):
            wrong[_option(name, module, config)] = received
    for option, received in wrong.items():
        yield option_problem(
            option,
            f'received {received}',
            f'{expected}, the classes of {dataset.option} '
            f'({quoted(dataset.classes)})',
            'Set these options in the config or by --cfg-options; or, if the '
            f'classes are not yours, set {dataset.option}.metainfo='
            'dict(classes=(...)).',
        )


def check_class_weights(config: Config, datasets: Datasets) -> Problems:
    """Compare the weights of segmentors' losses with the classes of heads."""
    model = config.get('model') or {}
    for key in ('decode_head', 'auxiliary_head'):
        for head in configs_in(model.get(key)):
            for loss in configs_in(head.get('loss_decode')):
                count = head.get('num_classes')
                weights = loss.get('class_weight')
                listed = isinstance(weights, (list, tuple))
                if listed and len(weights) != count:
                    yield option_problem(
                        f'model.{key}.loss_decode.class_weight',
                        f'{len(weights)} weights',
                        f'{count}, as num_classes',
                        'Give one weight for each class, or None.',
                    )


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
    if name == 'data_preprocessor' and name not in node:
        path = []  # the config's own
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
