"""Data sets as checks see them: read once, however many checks ask."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, wraps
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from PIL import Image
from rich.console import Console
from rich.progress import track

from e3va_mm.preflight.problems import Problems
from e3va_mm.utils.listing import listed

THREADS, CHUNK = 16, 16
LEAST = 100  # images or maps that are looked at, however long it takes
JPEG_START, JPEG_END = b'\xff\xd8\xff', b'\xff\xd9'
PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
IMAGES = ('.jpg', '.jpeg', '.png')
MISSING = 'no such file'
ORIENTATION = 274  # the EXIF tag
# By which colour types and backends of mmcv images are turned upright.
TURNED, TURNING = ('color', 'grayscale'), (None, 'cv2', 'pillow')
FRAMEWORKS = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmengine', 'e3va_mm')


class Entry(NamedTuple):
    """What checks need of a sample.

    Attributes:
        index (int): Its index in the data set.
        paths (dict[str, str]): Its files, by their names there.
        size (tuple[int, int], optional): Width and height of the image as the
            annotations have them.
        id (Any): The id of the image.
        labels (list[int]): Those of its boxes, or its own.
        flat_boxes (list[list]): Boxes without area.
        masks (list[tuple]): What is wrong with masks that are to be loaded:
            their box, and :func:`mask_fault`.
    """

    index: int
    paths: dict[str, str]
    size: tuple[int, int] | None
    id: Any
    labels: list[int]
    flat_boxes: list[list]
    masks: list[tuple[list | None, str, str]]


class Look(NamedTuple):
    """What start, end and header of a file say.

    Attributes:
        fault (str, optional): What is wrong with it.
        size (tuple[int, int], optional): Width and height of an image.
        orientation (int): That of EXIF; 1 is upright.
    """

    fault: str | None
    size: tuple[int, int] | None = None
    orientation: int = 1


class ReadDataset:
    """A data set, what it holds and how its files look.

    Args:
        option (str): The config option that it comes from, such as
            ``train_dataloader.dataset.datasets.0``.
        dataset (object): The data set.
        seconds (float, optional): How long to look at images, and again at
            maps, after the first hundred; by default until the end, 0 for
            none.
        samples (int, optional): Those of the whole loader, if that wraps it.
        shows (bool): Whether to show the progress.
    """

    def __init__(
        self,
        option: str,
        dataset: Any,
        seconds: float | None = None,
        samples: int | None = None,
        shows: bool = False,
    ) -> None:
        self.option, self.dataset = option, dataset
        self.seconds, self.shows = seconds, shows
        # Whether its classes are those of pixels.
        self.has_maps = hasattr(dataset, 'reduce_zero_label')
        self.loader = option.partition('.')[0]
        self.mode = self.loader.partition('_')[0]
        # LOADER.dataset.tasks.NAME...
        _, _, task = option.partition('.tasks.')
        self.task = task.partition('.')[0]
        self.samples = len(dataset) if samples is None else samples
        pipeline = getattr(dataset, 'pipeline', None)
        self.transforms = list(getattr(pipeline, 'transforms', ()))

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the data set."""
        value = getattr(self.dataset, name, default)
        return default if value is None else value

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; empty if it states none."""
        classes = self.metainfo.get('classes') or ()
        return () if isinstance(classes, str) else tuple(classes)

    def annotations(self) -> Any:
        """Read its ``ann_file``, of JSON; not kept, for it can be large."""
        file, backend = self.get('ann_file'), self.get('backend_args')
        return load(file, backend_args=backend)

    @property
    def metainfo(self) -> Mapping:
        """That of the data set."""
        return self.get('metainfo', {})

    def transform(self, kind: str) -> Any:
        """The first transform whose class, or a base of it, has a name."""
        for each in self.transforms:
            if any(base.__name__ == kind for base in type(each).__mro__):
                return each
        return None

    @property
    def is_stock(self) -> bool:
        """Whether all its transforms are those of the frameworks."""
        return all(
            type(each).__module__.split('.')[0] in FRAMEWORKS
            for each in self.transforms
        )

    @cached_property
    def entries(self) -> list[Entry]:
        """Its samples."""
        indices = range(len(self.dataset))
        indices = self._tracked(indices, len(indices), 'Annotations')
        return [*filter(None, map(self._entry, indices))]

    def _entry(self, index: int) -> Entry | None:
        """What annotations say of a sample."""
        try:
            info = self.dataset.get_data_info(index)
            height, width = info.get('height'), info.get('width')
            instances = info.get('instances') or ()
        except Exception:  # Data sets of videos give lists.
            return None
        size = (width, height) if width and height else None
        labels = np.atleast_1d(info.get('gt_label', ())).tolist()
        flat, masks = [], []
        loader = self.transform('LoadAnnotations')
        masked = getattr(loader, 'with_mask', False)
        masked = masked and 'segments_info' not in info  # of panoptic maps
        for each in instances:
            box, label = each.get('bbox'), each.get('bbox_label')
            if not each.get('ignore_flag'):
                labels += [label] if isinstance(label, int) else []
                if box and not (box[0] < box[2] and box[1] < box[3]):
                    flat.append(box)
            fault = masked and mask_fault(each, size, loader)
            masks += [(box, *fault)] if fault else []
        paths, identity = paths_in(info), info.get('img_id')
        return Entry(index, paths, size, identity, labels, flat, masks)

    @property
    def loads_images(self) -> bool:
        """Whether the frameworks' own loader reads local images."""
        loader = self.transform('LoadImageFromFile')
        if loader is None:
            # Without any, for example a part of what a wrapper mixes.
            return not any(
                type(each).__name__.startswith('Load')
                and type(each).__name__ != 'LoadAnnotations'
                for each in self.transforms
            ) and _is_local(self.get('backend_args'))
        return (
            type(loader).__module__.split('.')[0] in FRAMEWORKS
            and _is_local(getattr(loader, 'backend_args', None))
            and _is_local(getattr(loader, 'file_client_args', None))
        )

    @cached_property
    def files(self) -> dict[str, str]:
        """Local files -> their key in the samples."""
        maps = self.transform('LoadAnnotations')
        remote = set() if self.loads_images else {'img_path'}
        if not _is_local(getattr(maps, 'backend_args', None)):
            remote.add('seg_map_path')
        if self.transform('LoadImageFromFile') is None and remote:
            remote.add('seg_map_path')
        loads = {type(t).__name__ for t in self.transforms}
        if {n for n in loads if n[:4] == 'Load'} == {'LoadImageFromFile'}:
            remote.add('seg_map_path')  # predictions need none
        return {
            path: key
            for entry in self.entries
            for key, path in entry.paths.items()
            if key not in remote and '://' not in path
        }

    @cached_property
    def missing(self) -> set[str]:
        """Local files that are not there."""
        return {path for path in self.files if not os.path.exists(path)}

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How local files look, of those that there is time for."""
        present = [path for path in self.files if path not in self.missing]
        return self._spread(look, present, 'Images')

    @cached_property
    def map_values(self) -> dict[str, Counter]:
        """Pixels of each label in segmentation maps, as the loader gives it.

        Of maps with channels, their shape instead.
        """
        loader = self.transform('LoadAnnotations')
        if loader is None or not self.has_maps:
            return {}
        indices = {
            entry.paths['seg_map_path']: entry.index
            for entry in self.entries
            if self.files.get(entry.paths.get('seg_map_path'))
        }

        def count(path: str) -> Counter | None:
            try:
                info = self.dataset.get_data_info(indices[path])
                values = loader(info)['gt_seg_map']
            except Exception:  # Other checks name what cannot be read.
                return None
            if values.ndim > 2:  # of one pixel a side loaders make a list
                return Counter({values.shape: 1})
            counts = np.bincount(np.asarray(values, np.uint8).ravel())
            return Counter(
                {int(i): int(counts[i]) for i in counts.nonzero()[0]}
            )

        found = self._spread(count, list(indices), 'Maps')
        return {path: each for path, each in found.items() if each}

    def size_read(self, path: str) -> tuple[int, int] | None:
        """Width and height of an image as its loader gives it."""
        found = self.looks.get(path)
        if found is None or found.size is None:
            return None
        loader = self.transform('LoadImageFromFile')
        turned = (
            found.orientation >= 5
            and getattr(loader, 'color_type', 'color') in TURNED
            and getattr(loader, 'imdecode_backend', None) in TURNING
        )
        return found.size[::-1] if turned else found.size

    def _tracked(self, items: Iterable, total: int, what: str) -> Iterable:
        if not self.shows:
            return items
        title = f'{what} of {self.option}'
        console = Console(stderr=True)
        return track(items, title, total, console=console, transient=True)

    def _spread(self, function: Callable, items: list, what: str) -> dict:
        """``{item: function(item)}``, evenly spread where time is short."""
        if self.seconds is not None:
            random.Random(0).shuffle(items)
        found, start = {}, time.monotonic()
        if self.seconds == 0:
            return found
        # Starting threads takes longer than a few files.
        with ThreadPool(min(THREADS, 1 + len(items) // CHUNK)) as pool:
            results = pool.imap(function, items, CHUNK)
            results = self._tracked(results, len(items), what)
            for item, result in zip(items, results, strict=True):
                found[item] = result
                late = self.seconds and time.monotonic() - start > self.seconds
                if late and len(found) >= LEAST:
                    break
        return found


# By the options that they come from.
Datasets = Mapping[str, ReadDataset]


def for_each(check: Callable[[Config, ReadDataset], Problems]) -> Callable:
    """A check of each data set by itself, as one of all."""

    @wraps(check)
    def check_all(config: Config, datasets: Datasets) -> Problems:
        for dataset in datasets.values():
            yield from check(config, dataset)

    return check_all


def paths_in(info: Mapping) -> dict[str, str]:
    """The paths in an entry of a data set, by their names there."""
    return {
        key: path
        for key, path in info.items()
        if str(key).endswith('_path') and isinstance(path, str)
    }


def look(path: str) -> Look:
    """Look at a file without decoding it, if it looks whole.

    OpenCV decodes a truncated JPEG to grey without a word. Start and end are
    read, and files that look odd are decoded as a whole.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(8)
            length = file.seek(0, os.SEEK_END)
            file.seek(-min(length, 8), os.SEEK_END)
            end = file.read()
            size, orientation = _header(file)
    except FileNotFoundError:
        return Look(MISSING)
    except OSError as e:
        return Look(f'cannot be read, {e.strerror}')
    if length == 0:
        return Look('the file is empty')
    if start.startswith(JPEG_START):
        whole = end.endswith(JPEG_END)
    elif start == PNG_START:
        whole = end == PNG_END
    else:
        whole = os.path.splitext(path)[1].lower() not in IMAGES
    fault = None if whole else decoding_fault(path)
    return Look(fault, size, orientation)


def _header(file: Any) -> tuple[tuple[int, int] | None, int]:
    """Size and orientation; None for what only other readers know."""
    file.seek(0)
    try:
        with Image.open(file) as image:
            exif = image.getexif() if 'exif' in image.info else {}
            return image.size, exif.get(ORIENTATION, 1)
    except Exception:
        return None, 1


def decoding_fault(path: str, least: int = 1) -> str | None:
    """Why an image of ``least`` pixels a side cannot be decoded, or None."""
    try:
        with Image.open(path) as image:
            image.load()
            if min(image.size) < least:
                return f'the image has {image.width} x {image.height} pixels'
    # A malformed file can make a decoder fail in any way.
    except Exception as error:
        return f'cannot be decoded, {error}'
    return None


def mask_fault(
    instance: Mapping, size: tuple[int, int] | None, load: Any
) -> tuple[str, str] | None:
    """What is wrong with the mask of an instance, and how severe that is.

    mmdet fails over the errors and ignores the instance for the others.
    """
    mask = instance.get('mask')
    if not mask:
        return 'is missing or empty', 'error'
    if isinstance(mask, list):
        if not isinstance(mask[0], (list, tuple)):
            return 'is a flat list, not a list of polygons', 'error'
        if not any(len(p) % 2 == 0 and len(p) >= 6 for p in mask):
            return 'has no polygon of three points or more', 'warning'
    elif isinstance(mask, Mapping):
        if not {'counts', 'size'} <= set(mask):
            return f'has the keys {[*mask]}', 'warning'
        if size and list(mask['size']) != [size[1], size[0]]:
            return (
                f'is an RLE of the size (height, width) {list(mask["size"])} '
                f'in an image of {[size[1], size[0]]}',
                'error',
            )
        if not getattr(load, 'poly2mask', True):
            return 'is an RLE, and poly2mask=False', 'warning'
    else:
        return f'is of type {type(mask).__name__}', 'error'
    return None


def quoted(names: Iterable[str]) -> str:
    """Names for a message, at most 20 of them."""
    return listed([f"'{name}'" for name in names], 20)


def _is_local(arguments: Mapping | None) -> bool:
    """Whether arguments of a file backend are those of the local disk."""
    return (arguments or {}).get('backend') in (None, 'local', 'disk')
