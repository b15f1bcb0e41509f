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
from mmengine.structures import BaseDataElement
from PIL import Image
from torch import nn

from e3va_mm.errors import ConfigError, DataError, E3VAError
from e3va_mm.preflight.samples import CheckedSamples, decoding_fault
from e3va_mm.registry import HOOKS

THREADS = 16
SHOWN = 5  # files named in one error
ORIENTATION = 274  # the EXIF tag
LEAST_SIDE = 32  # the largest stride of most models
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
    * segmentation maps have the size of their pictures, as the files' headers
      say it;
    * pictures are complete. OpenCV decodes a truncated JPEG to grey without a
      word. Each file's start and end are read, and files that look odd are
      decoded as a whole.

    The first rank looks, all ranks raise. Files on remote storage
    (``backend_args``) are not looked at.

    While training, each sample is looked at where it is made, too, see
    :class:`~e3va_mm.preflight.samples.CheckedSamples`: a file that
    cannot be decoded and a segmentation map of another size or with values
    without a class end the run with its name.

    Args:
        check_content (bool): Whether to read the pictures' start and end, or
            only to see that the files exist. Defaults to True.

    Attributes:
        passed (bool): Whether a check has run to its end.
        batch (list[tuple[str, tuple]]): Pictures of the newest batch with
            their sizes as the model sees them.

    Raises:
        ConfigError: If a head's ``num_classes`` does not fit the data; the
            text names the options of all such heads.
        DataError: If a class, a picture or a file is missing or broken; the
            text names it and the option to look at.
    """

    priority = 'VERY_HIGH'

    def __init__(self, check_content: bool = True) -> None:
        if not isinstance(check_content, bool):
            raise ConfigError(
                'DatasetCheckHook: `check_content` should be True or False, '
                f'but got {check_content!r}.'
            )
        self.check_content = check_content
        self.passed = False
        self.batch: list[tuple[str, tuple[int, ...]]] = []

    def before_train(self, runner: Runner) -> None:
        """Checks the data of training and of validation."""
        datasets = {'train_dataloader': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val_dataloader'] = runner.val_dataloader.dataset
        self._check(runner, datasets)
        ignored = {
            module.ignore_index
            for module in runner.model.modules()
            if isinstance(getattr(module, 'ignore_index', None), int)
        }
        train = runner.train_dataloader.dataset
        for leaf in iter_leaves(train, 'train_dataloader.dataset'):
            own = getattr(leaf.dataset, 'prepare_data', None)
            if own is not None and not isinstance(own, CheckedSamples):
                leaf.dataset.prepare_data = CheckedSamples(
                    own, leaf.dataset, leaf.option, ignored
                )
        if _workers_have_begun(runner):
            runner.logger.warning(
                'All files were checked, but samples are not looked at while '
                'training: this mmengine starts the workers before any hook. '
                'Take onedl-mmengine>=0.10.8, or set '
                '`train_dataloader.num_workers=0` and '
                '`train_dataloader.persistent_workers=False`.'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        """Notes which pictures the step is about."""
        self.batch = list(_pictures(data_batch))

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """What fails from here on is not about them."""
        self.batch = []

    def before_val(self, runner: Runner) -> None:
        """Checks the data of a validation outside of training."""
        if not self.passed:
            self._check(
                runner, {'val_dataloader': runner.val_dataloader.dataset}
            )

    def before_test(self, runner: Runner) -> None:
        """Checks the data of a test."""
        self._check(
            runner, {'test_dataloader': runner.test_dataloader.dataset}
        )

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

    def _check_here(
        self, runner: Runner, datasets: Mapping[str, object]
    ) -> None:
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
            for task, own in _by_task(model, found):
                check_num_classes(task, own, runner.cfg)
            leaves.extend(found)
        count = check_files(leaves, self.check_content)
        if self.check_content:
            check_maps(leaves)
        runner.logger.info(
            f'Checked {count:,} files of {", ".join(datasets)} in '
            f'{time.monotonic() - start:.1f} s'
        )


def _workers_have_begun(runner: Runner) -> bool:
    """Whether samples are made by processes that hooks do not reach."""
    batches = getattr(runner.train_loop, 'dataloader_iterator', None)
    return (
        runner.train_dataloader.num_workers > 0
        and getattr(batches, '_iterator', None) is not None
    )


def _pictures(batch) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Paths and sizes of the pictures in a batch, whatever its form."""
    if isinstance(batch, BaseDataElement):
        if isinstance(batch.get('img_path'), str):
            yield batch.img_path, tuple(batch.get('img_shape') or ())
    elif isinstance(batch, Mapping):
        yield from _pictures([*batch.values()])
    elif isinstance(batch, (list, tuple)):
        for each in batch:
            yield from _pictures(each)


def check_batch(
    batch: Sequence[tuple[str, tuple[int, ...]]], cause: Exception
) -> None:
    """Look whether a failed step was about pictures that are no pictures.

    Args:
        batch (Sequence): ``batch`` of the hook.
        cause (Exception): What the step failed with.

    Raises:
        DataError: If a picture is smaller than one cell of a coarse map.
    """
    small = [
        f'  {path}: {size[0]} x {size[1]} pixels'
        for path, size in batch
        if size and min(size[:2]) < LEAST_SIDE
    ]
    if small:
        raise DataError(
            f'The step failed ({type(cause).__name__}: {cause}), and its '
            f'batch has pictures that reach the model with less than '
            f'{LEAST_SIDE} pixels a side:\n'
            + '\n'.join(small[:SHOWN])
            + '\nTake them out of the data (mmdet: '
            'filter_cfg=dict(min_size=...)), or let Resize enlarge '
            'them.'
        ) from cause
    if hasattr(cause, 'add_note'):  # Python >= 3.11
        cause.add_note(f'The pictures of the batch: {batch}')


def iter_leaves(dataset, option: str) -> Iterator[Leaf]:
    """The data sets inside wrappers (concatenated, repeated, mixed...)."""
    if hasattr(dataset, 'datasets'):
        for i, inner in enumerate(dataset.datasets):
            yield from iter_leaves(inner, f'{option}.datasets.{i}')
    elif hasattr(dataset, 'dataset'):
        yield from iter_leaves(dataset.dataset, f'{option}.dataset')
    elif hasattr(dataset, 'tasks'):
        for name, inner in dataset.tasks.items():
            yield from iter_leaves(inner, f'{option}.tasks.{name}')
    elif hasattr(dataset, 'get_data_info'):
        yield Leaf(option, dataset)


def _by_task(
    model: nn.Module, leaves: Sequence[Leaf]
) -> Iterator[tuple[nn.Module, list[Leaf]]]:
    """Models and their own data sets, where several train together."""
    if not hasattr(model, 'tasks'):
        yield model, list(leaves)
        return
    for name, task in model.tasks.items():
        # train_dataloader.dataset.tasks.NAME...
        yield (
            task,
            [leaf for leaf in leaves if leaf.option.split('.')[3] == name],
        )


def check_num_classes(
    model: nn.Module, leaves: Sequence[Leaf], cfg: Config
) -> None:
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
        if (
            name
            and isinstance(received, int)
            and received != expected
            and type(module).__name__ not in OTHER_CLASSES_TYPES
            and not any(
                part.startswith(OTHER_CLASSES) for part in name.split('.')
            )
        ):
            option = 'num_classes'
            if hasattr(module, 'num_things_classes'):
                option = 'num_things_classes + num_stuff_classes'
            path = '.'.join([_config_path(name, cfg), option])
            wrong[path] = received
    if wrong:
        lines = '\n'.join(
            f'  {option}: expected {expected}, received {n}'
            for option, n in wrong.items()
        )
        raise ConfigError(
            f'{leaves[0].option} has {expected} classes '
            f'({_shorten(_classes(leaves[0]))}), but the heads of the model '
            f'have another number:\n{lines}\nSet these options in the config '
            'or by --cfg-options; or, if the classes are not yours, set '
            f'{leaves[0].option}.metainfo=dict(classes=(...)).'
        )


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
    if not (
        hasattr(dataset, 'cat_ids') and hasattr(dataset, 'cat2label')
    ) or len(dataset.cat_ids) == len(classes):
        return
    content = load(
        dataset.ann_file, backend_args=getattr(dataset, 'backend_args', None)
    )
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
        f'Set {option}.metainfo=dict(classes=(...)) to names of the file.'
    )


def check_not_empty(leaf: Leaf) -> None:
    """Raise DataError if no picture is left, or none was there."""
    if len(leaf.dataset) == 0:
        filter_cfg = getattr(leaf.dataset, 'filter_cfg', None)
        raise DataError(
            f'{leaf.option} is empty: no picture of '
            f'{_source(leaf)} is left to read. Expected at '
            'least one with an annotation of one of its classes '
            f'({_shorten(_classes(leaf))}) that passes '
            f'{leaf.option}.filter_cfg ({filter_cfg}).'
        )


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
            lambda part: [
                (path, _fault(path, check_content)) for path in part
            ],
            slices,
        )
        faults = {path: fault for part in states for path, fault in part}
    missing = [path for path in paths if faults[path] == 'missing']
    if missing:
        raise DataError(
            f'{len(missing):,} of {len(paths):,} files that the data names '
            f'do not exist:\n{_name_files(missing, options)}\n'
            'Check the options in brackets, data_root beside them and the '
            'names in ann_file.'
        )
    broken = [path for path in paths if faults[path] is not None]
    if broken:
        raise DataError(
            f'{len(broken):,} of {len(paths):,} files are damaged:\n'
            f'{_name_files(broken, options, faults)}\n'
            'Copy these files again, take them out of the annotations, or, if '
            'they are as they should be, set custom_hooks='
            "[dict(type='e3va_mm.DatasetCheckHook', check_content=False)]."
        )
    return len(paths)


def check_maps(leaves: Sequence[Leaf]) -> None:
    """Compare the sizes of segmentation maps with those of the pictures.

    A pipeline that brings both to one size hides a map of another.

    Raises:
        DataError: If they differ. Names the first five.
    """
    pairs = {}
    for leaf in leaves:
        for key, path, info in _local_files(leaf):
            picture = info.get('img_path')
            if key == 'seg_map_path' and isinstance(picture, str):
                pairs[path] = picture
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = pool.map(lambda pair: [*map(_size, pair)], pairs.items())
        faults = [
            f'  {path}: {of_map} beside {of_picture} of {picture}'
            for (path, picture), (of_map, of_picture) in zip(
                pairs.items(), sizes, strict=True
            )
            if None not in (of_map, of_picture)
            and of_map != of_picture
            and not (of_map == of_picture[::-1] and _is_turned(picture))
        ]
    if faults:
        more = len(faults) - SHOWN
        if more > 0:
            faults[SHOWN:] = [f'  ... and {more:,} more']
        raise DataError(
            f'{len(faults) if more <= 0 else SHOWN + more:,} of '
            f'{len(pairs):,} segmentation maps have another size (width, '
            'height) than their picture:\n'
            + '\n'.join(faults)
            + '\nMake the maps for these pictures again, or take both out.'
        )


def _size(path: str) -> tuple[int, int] | None:
    """Width and height by the header."""
    try:
        with Image.open(path) as image:
            return image.size
    # Formats that only other readers know.
    except Exception:
        return None


def _is_turned(path: str) -> bool:
    """Whether readers turn a picture upright."""
    with Image.open(path) as image:
        return image.getexif().get(ORIENTATION, 1) >= 5


def _classes(leaf: Leaf) -> Sequence[str]:
    """The names of a data set's classes; empty if it states none."""
    classes = leaf.dataset.metainfo.get('classes') or ()
    if isinstance(classes, str):
        raise ConfigError(
            f'{leaf.option}.metainfo: expected classes=(...) with a tuple of '
            f"names, but got the string '{classes}'. For a single class "
            f"write classes=('{classes}', ), with a comma."
        )
    return classes


def _shorten(names: Sequence[str]) -> str:
    """Names for an error, at most 20 of them."""
    text = ', '.join(f"'{name}'" for name in names[:20])
    return text + (f', ... {len(names)} in all' if len(names) > 20 else '')


def _source(leaf: Leaf) -> str:
    """Where a data set lists its pictures: a file, else folders."""
    return getattr(leaf.dataset, 'ann_file', '') or str(
        getattr(leaf.dataset, 'data_prefix', 'its source')
    )


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
    folders = {}
    for key, path, _ in _local_files(leaf):
        if key not in folders:
            folders[key] = _folder_option(leaf, key)
        yield path, folders[key]


def _local_files(leaf: Leaf) -> Iterator[tuple[str, str, dict]]:
    """Key, path and the rest of the entry of each file on a local disk."""
    option, dataset = leaf
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend')
    if backend not in (None, 'local'):
        print_log(
            f'{option}: files on the backend {backend!r} are not checked',
            logger='current',
            level=logging.WARNING,
        )
        return
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        for key, path in info.items():
            if key.endswith('_path') and isinstance(path, str):
                yield key, path, info


def _folder_option(leaf: Leaf, key: str) -> str:
    """``data_prefix.img`` for ``img_path``, ``data_root`` for others."""
    prefixes = getattr(leaf.dataset, 'data_prefix', {})
    for prefix in (key, key.removesuffix('_path')):
        if prefix in prefixes:
            return f'{leaf.option}.data_prefix.{prefix}'
    return f'{leaf.option}.data_root'


def _name_files(
    paths: Sequence[str],
    options: Mapping[str, str],
    faults: Mapping[str, str] | None = None,
) -> str:
    lines = [
        f'  {path}'
        + (f': {faults[path]}' if faults else '')
        + f'  [{options[path]}]'
        for path in paths[:SHOWN]
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
    return None if whole else decoding_fault(path)
