"""Checks of the files that data sets name."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

from mmengine.config import Config
from PIL import Image

from e3va_mm.preflight.problems import Problem

THREADS, CHUNK = 16, 64
JPEG_START, JPEG_END = b'\xff\xd8\xff', b'\xff\xd9'
PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
IMAGES = ('.jpg', '.jpeg', '.png')
MISSING = 'no such file'
CHECK_NAMES = (
    'Check these options, data_root beside them and the names in ann_file.'
)
CHECK_FILES = (
    'Copy these files again, take them out of the annotations, or, if they '
    "are as they should be, set custom_hooks=[dict(type='e3va_mm."
    "DatasetCheckHook', check_content=False)]."
)


def check_files(
    config: Config, datasets: Mapping[str, Any], content: bool = True
) -> Iterator[Problem]:
    """Look at every local file that the data sets name.

    OpenCV decodes a truncated JPEG to grey without a word. Start and end of
    each file are read, and files that look odd are decoded as a whole.

    ``content=False`` only looks whether they exist.
    """
    options = {}
    for option, dataset in datasets.items():
        if not is_local(dataset):
            yield Problem(
                option,
                f'files on the backend {dataset.backend_args["backend"]!r}',
                'files on a local disk',
                'These files are not checked.',
                severity='warning',
            )
        for key, path, _ in local_files(dataset):
            options[path] = _folder_option(dataset, option, key)
    with ThreadPool(THREADS) as pool:
        find = partial(_fault, content=content)
        faults = pool.map(find, options, CHUNK)
    for (path, option), fault in zip(options.items(), faults, strict=True):
        if fault is not None:
            yield Problem(
                path,
                fault,
                f'a whole file, as {option} says',
                CHECK_NAMES if fault == MISSING else CHECK_FILES,
            )


def is_local(dataset: Any) -> bool:
    """Whether the files of a data set lie on a disk of this machine."""
    arguments = getattr(dataset, 'backend_args', None) or {}
    return arguments.get('backend') in (None, 'local')


def local_files(dataset: Any) -> Iterator[tuple[str, str, dict]]:
    """Key, path and the whole entry of each local file of a data set."""
    for i in range(len(dataset) if is_local(dataset) else 0):
        info = dataset.get_data_info(i)
        for key, path in paths_in(info).items():
            yield key, path, info


def paths_in(info: Mapping) -> dict[str, str]:
    """The paths in an entry of a data set, by their names there."""
    return {
        key: path
        for key, path in info.items()
        if str(key).endswith('_path') and isinstance(path, str)
    }


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


def _folder_option(dataset: Any, option: str, key: str) -> str:
    """``data_prefix.img`` for ``img_path``, ``data_root`` for others."""
    for prefix in (key, key.removesuffix('_path')):
        if prefix in getattr(dataset, 'data_prefix', {}):
            return f'{option}.data_prefix.{prefix}'
    return f'{option}.data_root'


def _fault(path: str, content: bool) -> str | None:
    """What is wrong with a file, None for nothing."""
    try:
        if not content:
            return None if os.path.isfile(path) else MISSING
        with open(path, 'rb') as file:
            start = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(size, 8), os.SEEK_END)
            end = file.read()
    except FileNotFoundError:
        return MISSING
    except OSError as e:
        return f'cannot be read, {e.strerror}'
    if size == 0:
        return 'the file is empty'
    if start.startswith(JPEG_START):
        whole = end.endswith(JPEG_END)
    elif start == PNG_START:
        whole = end == PNG_END
    else:
        whole = os.path.splitext(path)[1].lower() not in IMAGES
    return None if whole else decoding_fault(path)
