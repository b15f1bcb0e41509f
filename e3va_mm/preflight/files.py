"""Checks of the files that data sets name."""

import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

from mmengine.config import Config

from e3va_mm.preflight.problems import Problem, Problems
from e3va_mm.preflight.reading import MISSING, ReadDataset, for_each

CHECK_NAMES = (
    'Check these options, data_root beside them and the names in ann_file.'
)
CHECK_FILES = (
    'Copy these files again, take them out of the annotations, or, if they '
    "are as they should be, switch this check off: skip=['files']."
)


@for_each
def check_files(config: Config, dataset: ReadDataset) -> Problems:
    """Look at every local file that the data sets name.

    Files that other backends and loaders read are left to these.
    """
    beside = _files_beside(dataset.missing)
    for path, key in dataset.files.items():
        if path in dataset.missing:
            others = beside[os.path.splitext(path)[0]]
            fault = MISSING + f' (there is {", ".join(others)})' * bool(others)
            advice = CHECK_NAMES
        else:
            found = dataset.looks.get(path)
            fault, advice = found and found.fault, CHECK_FILES
        if fault:
            expected = f'a whole file, as {_folder_option(dataset, key)} says'
            yield Problem(path, fault, expected, advice)


@for_each
def check_image_sizes(config: Config, dataset: ReadDataset) -> Problems:
    """Compare the sizes in annotations with those of the images."""
    for entry in dataset.entries:
        path = entry.paths.get('img_path')
        found = dataset.size_read(path)
        if None in (found, entry.size) or found == entry.size:
            continue
        turned, end = '', '.'
        orientation = dataset.looks[path].orientation
        if orientation >= 5 and found == entry.size[::-1]:
            turned = f' after its EXIF orientation {orientation} has turned it'
            end = (
                ', or read images as they are stored: '
                "LoadImageFromFile(color_type='color_ignore_orientation')."
            )
        source = entry.paths.get('xml_path') or dataset.get('ann_file')
        yield Problem(
            path,
            f'the image has {_text(found)} pixels{turned}',
            f'{_text(entry.size)} as {source or dataset.option} says',
            'Boxes would be in other places than the objects. Scale the '
            f'annotations, or take the images that they were made for{end}',
        )


@for_each
def check_map_sizes(config: Config, dataset: ReadDataset) -> Problems:
    """Compare the sizes of segmentation maps with those of their images.

    A pipeline that brings both to one size hides a map of another.
    """
    for entry in dataset.entries:
        path, image = map(entry.paths.get, ('seg_map_path', 'img_path'))
        expected, found = dataset.size_read(image), dataset.looks.get(path)
        if None in (expected, found) or found.size in (None, expected):
            continue
        turned, end = '', '.'
        orientation = dataset.looks[image].orientation
        if orientation >= 5:
            turned = f' (EXIF orientation {orientation})'
            end = ', or save the images upright.'
        yield Problem(
            path,
            f'the map has {_text(found.size)} pixels',
            f'{_text(expected)} as its image {image}{turned}',
            f'Make the maps for these images again, or take both out{end}',
        )


def _text(size: tuple[int, int]) -> str:
    return f'{size[0]} x {size[1]}'


def _files_beside(paths: Iterable[str]) -> dict[str, list[str]]:
    """Names of the files in the folders of some, by path without ending."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for folder in {os.path.dirname(path) for path in paths}:
        with suppress(OSError):
            for name in os.listdir(folder or '.'):
                stem = os.path.splitext(name)[0]
                names[os.path.join(folder, stem)].append(name)
    return names


def _folder_option(dataset: ReadDataset, key: str) -> str:
    """``data_prefix.img`` for ``img_path``, ``data_root`` for others."""
    for prefix in (key, key.removesuffix('_path')):
        if prefix in dataset.get('data_prefix', {}):
            return f'{dataset.option}.data_prefix.{prefix}'
    return f'{dataset.option}.data_root'
