"""Checks of segmentation maps."""

from collections.abc import Iterator, Mapping
from multiprocessing.pool import ThreadPool
from typing import Any

from mmengine.config import Config
from PIL import Image

from e3va_mm.preflight.files import CHUNK, THREADS, local_files
from e3va_mm.preflight.problems import Problem

ORIENTATION = 274  # the EXIF tag


def check_map_sizes(
    config: Config, datasets: Mapping[str, Any]
) -> Iterator[Problem]:
    """Compare the sizes of segmentation maps with those of their images.

    The headers of the files are read. A pipeline that brings both to one size
    hides a map of another.
    """
    images = {
        path: info['img_path']
        for dataset in datasets.values()
        for key, path, info in local_files(dataset)
        if key == 'seg_map_path' and isinstance(info.get('img_path'), str)
    }
    with ThreadPool(THREADS) as pool:
        of_maps = pool.map(_size, images, CHUNK)
        of_images = pool.map(_size, images.values(), CHUNK)
    for (path, image), found, expected in zip(
        images.items(), of_maps, of_images, strict=True
    ):
        if (
            None not in (found, expected)
            and found != expected
            and not (found == expected[::-1] and _is_turned(image))
        ):
            yield Problem(
                path,
                f'the map has the size (width, height) {found}',
                f'{expected} as its image {image}',
                'Make the maps for these images again, or take both out.',
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
    """Whether readers turn an image upright."""
    with Image.open(path) as image:
        return image.getexif().get(ORIENTATION, 1) >= 5
