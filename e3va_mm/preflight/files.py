"""Checks of the files that data sets name."""

import os
from collections.abc import Iterator, Mapping

from mmengine.config import Config

from e3va_mm.preflight.problems import Problem
from e3va_mm.preflight.reading import MISSING, ReadDataset

CHECK_NAMES = (
    'Check these options, data_root beside them and the names in ann_file.'
)
CHECK_FILES = (
    'Copy these files again, take them out of the annotations, or, if they '
    "are as they should be, switch this check off: skip=['files']."
)


def check_files(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Look at every local file that the data sets name.

    Files that other backends and loaders read are left to these.
    """
    for dataset in datasets.values():
        for path in dataset.files:
            if path in dataset.missing:
                fault, advice = MISSING, CHECK_NAMES
                others = _others(path)
                if others:
                    advice = f'There is {others} beside it. {advice}'
            else:
                found = dataset.looks.get(path)
                fault, advice = found and found.fault, CHECK_FILES
            if fault:
                option = _folder_option(dataset, dataset.files[path])
                yield Problem(
                    path, fault, f'a whole file, as {option} says', advice
                )


def check_image_sizes(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Compare the sizes in annotations with those of the images."""
    for dataset in datasets.values():
        for entry in dataset.entries:
            path = entry.paths.get('img_path')
            found = dataset.size_read(path)
            if None in (found, entry.size) or found == entry.size:
                continue
            stored = dataset.looks[path]
            turned = ''
            if stored.orientation >= 5 and found == entry.size[::-1]:
                turned = (
                    f' after its EXIF orientation {stored.orientation} has '
                    'turned it'
                )
            source = entry.paths.get('xml_path') or dataset.get('ann_file')
            yield Problem(
                path,
                f'the image has {_text(found)} pixels{turned}',
                f'{_text(entry.size)} as {source or dataset.option} says',
                'Boxes would be in other places than the objects. Scale the '
                'annotations, or take the images that they were made for'
                + (
                    ', or read images as they are stored: '
                    "LoadImageFromFile(color_type='color_ignore_orientation')."
                    if turned
                    else '.'
                ),
            )


def check_map_sizes(
    config: Config, datasets: Mapping[str, ReadDataset]
) -> Iterator[Problem]:
    """Compare the sizes of segmentation maps with those of their images.

    A pipeline that brings both to one size hides a map of another.
    """
    for dataset in datasets.values():
        for entry in dataset.entries:
            path, image = (
                entry.paths.get(key) for key in ('seg_map_path', 'img_path')
            )
            expected = dataset.size_read(image)
            found = dataset.looks.get(path)
            if expected is None or found is None or found.size is None:
                continue
            if found.size != expected:
                turned = dataset.looks[image].orientation
                turned = f' (EXIF orientation {turned})' * (turned >= 5)
                yield Problem(
                    path,
                    f'the map has {_text(found.size)} pixels',
                    f'{_text(expected)} as its image {image}{turned}',
                    'Make the maps for these images again, or take both out'
                    + ('.', ', or save the images upright.')[bool(turned)],
                )


def _text(size: tuple[int, int]) -> str:
    return f'{size[0]} x {size[1]}'


def _others(path: str) -> str:
    """Files beside one that is missing, with another ending."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    try:
        names = os.listdir(folder)
    except OSError:
        return ''
    return ', '.join(n for n in names if os.path.splitext(n)[0] == stem)


def _folder_option(dataset: ReadDataset, key: str) -> str:
    """``data_prefix.img`` for ``img_path``, ``data_root`` for others."""
    for prefix in (key, key.removesuffix('_path')):
        if prefix in dataset.get('data_prefix', {}):
            return f'{dataset.option}.data_prefix.{prefix}'
    return f'{dataset.option}.data_root'
