import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import load
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from ...errors import ConfigError, DataError, E3VAError
from ...registry import HOOKS

THREADS = 16
SHOWN = 5  # files named in one error
JPEG_START, JPEG_END = b'\xff\xd8\xff', b'\xff\xd9'
PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
# Where `num_classes` does not count the classes of the data set: trunks and
# their classifiers, class-agnostic proposals, stuff maps, edge maps, losses.
OTHER_CLASSES = ('backbone', 'rpn_head', 'semantic_head', 'loss')
OTHER_CLASSES_TYPES = ('RPNHead', 'GARPNHead', 'STDCHead')


class Leaf(NamedTuple):
    """A data set that reads files, and the config option it came from."""

    option: str
    dataset: object


@HOOKS.register_module()
class DatasetCheckHook(Hook):
    """Looks at all data before the first step, and says what is wrong.

    Checked are the data sets of training and validation before training, and
    those of a validation or test run on their own, inside any wrapper:

    * every class has its category in a COCO-like annotation file;
    * the data set is not empty;
    * every head's ``num_classes`` is the number of classes of the data;
    * **all** files that the data names exist;
    * pictures are complete. OpenCV decodes a truncated JPEG to grey without a
      word. Each file's start and end are read, and files that look odd are
      decoded as a whole.

    The first rank looks, all ranks raise. Files on remote storage
    (``backend_args``) are not looked at.

    Args:
        check_content (bool): Whether to read the pictures' start and end, or
            only to see that the files exist. Defaults to True.

    Attributes:
        passed (bool): Whether a check has run to its end.

    Raises:
        ConfigError: If a head's ``num_classes`` does not fit the data; the
            text names the options of all such heads.
        DataError: If a class, a picture or a file is missing or broken; the
            text names it and the option to look at.
    """

    priority = 'VERY_HIGH'

    def __init__(self, check_content: bool = True) -> None:
        self.check_content = check_content
        self.passed = False

    def before_train(self, runner: Runner) -> None:
        """Checks the data of training and of validation."""
        datasets = {'train_dataloader': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val_dataloader'] = runner.val_dataloader.dataset
        self._check(runner, datasets)

    def before_val(self, runner: Runner) -> None:
        """Checks the data of a validation outside of training."""
        if not self.passed:
            self._check(runner,
                        {'val_dataloader': runner.val_dataloader.dataset})

    def before_test(self, runner: Runner) -> None:
        """Checks the data of a test."""
        self._check(runner,
                    {'test_dataloader': runner.test_dataloader.dataset})

    def _check(self, runner: Runner, datasets: Mapping[str, object]) -> None:
        error = None
        if is_main_process():
            try:
                self._check_here(runner, datasets)
            except E3VAError as e:
                error = e
        # Were the first rank to raise alone, the others would wait for it.
        message = [error and (type(error), str(error))]
        broadcast_object_list(message)
        if error is not None:
            raise error
        if message[0] is not None:
            error_type, text = message[0]
            raise error_type(text)
        self.passed = True

    def _check_here(self, runner: Runner,
                    datasets: Mapping[str, object]) -> None:
        start = time.monotonic()
        model = runner.model
        if is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        leaves = []
        for loader, dataset in datasets.items():
            found = list(iter_leaves(dataset, f'{loader}.dataset'))
            for leaf in found:
                check_classes(leaf)
                check_not_empty(leaf)
            check_num_classes(model, found, runner.cfg)
            leaves.extend(found)
        count = check_files(leaves, self.check_content)
        runner.logger.info(
            f'Checked {count:,} files of {", ".join(datasets)} in '
            f'{time.monotonic() - start:.1f} s')


def iter_leaves(dataset, option: str) -> Iterator[Leaf]:
    """The data sets inside wrappers (concatenated, repeated, mixed...)."""
    if hasattr(dataset, 'datasets'):
        for i, inner in enumerate(dataset.datasets):
            yield from iter_leaves(inner, f'{option}.datasets.{i}')
    elif hasattr(dataset, 'dataset'):
        yield from iter_leaves(dataset.dataset, f'{option}.dataset')
    elif hasattr(dataset, 'get_data_info'):
        yield Leaf(option, dataset)


def check_num_classes(model: nn.Module, leaves: Sequence[Leaf],
                      cfg: Config) -> None:
    """Compare every head's ``num_classes`` with the classes of the data.

    Left out are models of open vocabulary (``language_model``), panoptic data,
    whose heads divide the classes among them, and data sets that differ in
    their number of classes or state none.

    Raises:
        ConfigError: If a head has another number; names all such heads.
    """
    counts = {len(_classes(leaf)) for leaf in leaves}
    panoptic = any('thing_classes' in leaf.dataset.metainfo for leaf in leaves)
    if len(counts) != 1 or panoptic or hasattr(model, 'language_model'):
        return
    expected = counts.pop()
    if not expected:
        return
    wrong = {}
    for name, module in model.named_modules():
        received = getattr(module, 'num_classes', None)
        if (name and isinstance(received, int) and received != expected
                and type(module).__name__ not in OTHER_CLASSES_TYPES
                and not any(
                    part.startswith(OTHER_CLASSES)
                    for part in name.split('.'))):
            option = 'num_classes'
            if hasattr(module, 'num_things_classes'):
                option = 'num_things_classes + num_stuff_classes'
            path = '.'.join([_config_path(name, cfg), option])
            wrong[path] = received
    if wrong:
        lines = '\n'.join(f'  {option}: expected {expected}, received {n}'
                          for option, n in wrong.items())
        raise ConfigError(
            f'{leaves[0].option} has {expected} classes '
            f'({_shorten(_classes(leaves[0]))}), but the heads of the model '
            f'have another number:\n{lines}\nSet these options in the config '
            'or by --cfg-options; or, if the classes are not yours, set '
            f'{leaves[0].option}.metainfo=dict(classes=(...)).')


def check_classes(leaf: Leaf) -> None:
    """Compare the classes with a COCO-like file's categories.

    mmdet leaves out a class without category in silence and shifts the labels
    of those after it.

    Raises:
        DataError: If a class has no category in the annotation file.
    """
    option, dataset = leaf
    classes = _classes(leaf)
    # The ids are those of the categories whose name is a class.
    if not (hasattr(dataset, 'cat_ids') and hasattr(dataset, 'cat2label')
            ) or len(dataset.cat_ids) == len(classes):
        return
    content = load(
        dataset.ann_file, backend_args=getattr(dataset, 'backend_args', None))
    names = [category['name'] for category in content['categories']]
    missing = [name for name in classes if name not in names]
    repeated = [
        name for name, n in Counter(names).items() if n > 1 and name in classes
    ]
    if missing:
        what = f'no category for {len(missing)} of {len(classes)} classes'
        which = missing
    else:
        what, which = 'several categories with the same name', repeated
    raise DataError(
        f'{option}.ann_file: {dataset.ann_file} has {what}: '
        f'{_shorten(which)}.\n'
        f'  classes of the data set: {_shorten(classes)}\n'
        f'  categories of the file: {_shorten(names)}\n'
        f'Set {option}.metainfo=dict(classes=(...)) to names of the file.')


def check_not_empty(leaf: Leaf) -> None:
    """Raise DataError if no picture is left, or none was there."""
    if len(leaf.dataset) == 0:
        filter_cfg = getattr(leaf.dataset, 'filter_cfg', None)
        raise DataError(
            f'{leaf.option} is empty: no picture of '
            f'{_source(leaf)} is left to read. Expected at '
            'least one with an annotation of one of its classes '
            f'({_shorten(_classes(leaf))}) that passes '
            f'{leaf.option}.filter_cfg ({filter_cfg}).')


def check_files(leaves: Sequence[Leaf], check_content: bool = True) -> int:
    """Look at every file that the data sets name.

    Args:
        leaves (Sequence[Leaf]): The data sets.
        check_content (bool): Whether to look into the files as well.
            Defaults to True.

    Returns:
        int: How many files were looked at, each counted once.

    Raises:
        DataError: If a file is missing or, with ``check_content``, no
            complete picture. Names the first five and their options.
    """
    options = {}
    for leaf in leaves:
        options.update(_named_files(leaf))
    paths = list(options)
    with ThreadPoolExecutor(THREADS) as pool:
        slices = [paths[i::THREADS] for i in range(THREADS)]
        states = pool.map(
            lambda part: [(path, _fault(path, check_content))
                          for path in part], slices)
        faults = {path: fault for part in states for path, fault in part}
    missing = [path for path in paths if faults[path] == 'missing']
    if missing:
        raise DataError(
            f'{len(missing):,} of {len(paths):,} files that the data names '
            f'do not exist:\n{_name_files(missing, options)}\n'
            'Check the options in brackets, data_root beside them and the '
            'names in ann_file.')
    broken = [path for path in paths if faults[path] is not None]
    if broken:
        raise DataError(
            f'{len(broken):,} of {len(paths):,} files are damaged:\n'
            f'{_name_files(broken, options, faults)}\n'
            'Copy these files again, take them out of the annotations, or, if '
            'they are as they should be, set custom_hooks='
            "[dict(type='e3va_mm.DatasetCheckHook', check_content=False)].")
    return len(paths)


def _classes(leaf: Leaf) -> Sequence[str]:
    """The names of a data set's classes; empty if it states none."""
    classes = leaf.dataset.metainfo.get('classes') or ()
    if isinstance(classes, str):
        raise ConfigError(
            f'{leaf.option}.metainfo: expected classes=(...) with a tuple of '
            f"names, but got the string '{classes}'. For a single class "
            f"write classes=('{classes}', ), with a comma.")
    return classes


def _shorten(names: Sequence[str]) -> str:
    """Names for an error, at most 20 of them."""
    text = ', '.join(f"'{name}'" for name in names[:20])
    return text + (f', ... {len(names)} in all' if len(names) > 20 else '')


def _source(leaf: Leaf) -> str:
    """Where a data set lists its pictures: a file, else folders."""
    return (getattr(leaf.dataset, 'ann_file', '')
            or str(getattr(leaf.dataset, 'data_prefix', 'its source')))


def _config_path(name: str, cfg: Config) -> str:
    """The config option behind a module's name.

    Heads repeated from one option (``roi_head.bbox_head.0``, ``.1``...) have
    no index there.
    """
    path, node = ['model'], cfg.get('model', {})
    node = node.get('module', node)  # inside test time augmentation
    for part in name.split('.'):
        if part.isdigit():
            if not isinstance(node, Sequence):
                continue
            part = int(part)
            node = node[part] if part < len(node) else {}
        else:
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        path.append(str(part))
    return '.'.join(path)


def _named_files(leaf: Leaf) -> Iterator[tuple[str, str]]:
    """Each file that a data set names, and the option of its folder."""
    option, dataset = leaf
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend')
    if backend not in (None, 'local'):
        print_log(
            f'{option}: files on the backend {backend!r} are not checked',
            logger='current',
            level=logging.WARNING)
        return
    folders = {}
    for i in range(len(dataset)):
        for key, path in dataset.get_data_info(i).items():
            if key.endswith('_path') and isinstance(path, str):
                if key not in folders:
                    folders[key] = _folder_option(leaf, key)
                yield path, folders[key]


def _folder_option(leaf: Leaf, key: str) -> str:
    """``data_prefix.img`` for ``img_path``, ``data_root`` for others."""
    prefixes = getattr(leaf.dataset, 'data_prefix', {})
    for prefix in (key, key.removesuffix('_path')):
        if prefix in prefixes:
            return f'{leaf.option}.data_prefix.{prefix}'
    return f'{leaf.option}.data_root'


def _name_files(paths: Sequence[str],
                options: Mapping[str, str],
                faults: Mapping[str, str] | None = None) -> str:
    lines = [
        f'  {path}' + (f': {faults[path]}' if faults else '') +
        f'  [{options[path]}]' for path in paths[:SHOWN]
    ]
    if len(paths) > SHOWN:
        lines.append(f'  ... and {len(paths) - SHOWN:,} more')
    return '\n'.join(lines)


def _fault(path: str, check_content: bool) -> str | None:
    """What is wrong with a file, None for nothing."""
    try:
        if not check_content:
            return None if os.path.isfile(path) else 'missing'
        with open(path, 'rb') as file:
            start = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(size, 8), os.SEEK_END)
            end = file.read()
    except FileNotFoundError:
        return 'missing'
    except OSError as e:
        return f'cannot be read, {e.strerror}'
    if size == 0:
        return 'empty'
    suffix = os.path.splitext(path)[1].lower()
    if start.startswith(JPEG_START):
        whole = end.endswith(JPEG_END)
    elif start == PNG_START:
        whole = end == PNG_END
    else:
        whole = suffix not in ('.jpg', '.jpeg', '.png')
    return None if whole else _decoding_fault(path)


def _decoding_fault(path: str) -> str | None:
    """Decode a picture as a whole: bytes after its end do no harm."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as e:
        return f'cannot be decoded, {e}'
    return None
