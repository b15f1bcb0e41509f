"""Checks of classes: those of the data, of annotation files and of heads."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.fileio import load
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.preflight.problems import Problem
from e3va_mm.utils.listing import listed

# Where `num_classes` does not count the classes of the data set: trunks and
# their classifiers, class-agnostic proposals, stuff maps, edge maps, losses.
OTHER_CLASSES = ('backbone', 'rpn_head', 'semantic_head', 'loss')
OTHER_CLASSES_TYPES = ('RPNHead', 'GARPNHead', 'STDCHead')


def check_class_names(
    config: Config, datasets: Mapping[str, Any]
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
    config: Config, datasets: Mapping[str, Any]
) -> Iterator[Problem]:
    """Compare the classes with the categories of a COCO-like file.

    mmdet leaves out a class without a category in silence, and shifts the
    labels of those after it.
    """
    for option, dataset in datasets.items():
        classes = classes_of(dataset)
        # The ids are those of the categories whose name is a class.
        if not (
            hasattr(dataset, 'cat_ids') and hasattr(dataset, 'cat2label')
        ) or len(dataset.cat_ids) == len(classes):
            continue
        content = load(
            dataset.ann_file,
            backend_args=getattr(dataset, 'backend_args', None),
        )
        names = [category['name'] for category in content['categories']]
        wrong = [name for name in classes if name not in names]
        what = f'no category for {len(wrong)} of {len(classes)} classes'
        if not wrong:
            what = 'several categories of the same name'
            wrong = [name for name in classes if names.count(name) > 1]
        yield Problem(
            f'{option}.ann_file',
            f'{dataset.ann_file} has {what}: {quoted(wrong)} (its '
            f'categories: {quoted(names)})',
            f'one category for each class of the data set: {quoted(classes)}',
            f'Set {option}.metainfo=dict(classes=(...)) to names of the file.',
        )


def check_not_empty(
    config: Config, datasets: Mapping[str, Any]
) -> Iterator[Problem]:
    """Find data sets without an image, or with none left by filters."""
    for option, dataset in datasets.items():
        if len(dataset) == 0:
            source = getattr(dataset, 'ann_file', '') or str(
                getattr(dataset, 'data_prefix', 'its source')
            )
            yield Problem(
                option,
                f'the data set is empty, no image of {source} is left',
                'at least one with an annotation of one of its classes '
                f'({quoted(classes_of(dataset))})',
                f'Look at {source} and at {option}.filter_cfg '
                f'({getattr(dataset, "filter_cfg", None)}).',
            )


def check_heads(
    config: Config, datasets: Mapping[str, Any], model: nn.Module
) -> Iterator[Problem]:
    """Compare every head's ``num_classes`` with the classes of the data.

    Left out are models of open vocabulary (``language_model``), panoptic data,
    whose heads divide the classes among them, and data sets that differ in
    their number of classes or state none.
    """
    if hasattr(model, 'tasks'):  # TrainLoader.dataset.tasks.NAME...
        for name, task in model.tasks.items():
            own = {
                o: d for o, d in datasets.items() if o.split('.')[3] == name
            }
            yield from check_heads(config, own, task)
        return
    counts = {len(classes_of(dataset)) for dataset in datasets.values()}
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
            f'{expected}, the classes of {data} '
            f'({quoted(classes_of(dataset))})',
            'Set these options in the config or by --cfg-options; or, if the '
            f'classes are not yours, set {data}.metainfo=dict(classes=(...)).',
            error=ConfigError,
        )


def classes_of(dataset: Any) -> Sequence[str]:
    """The names of a data set's classes; empty if it states none."""
    classes = dataset.metainfo.get('classes') or ()
    return () if isinstance(classes, str) else classes


def quoted(names: Sequence[str]) -> str:
    """Names for a message, at most 20 of them."""
    return listed([f"'{name}'" for name in names], 20)


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
