"""What stands in the batch of a data loader, whatever its form."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.structures import BaseDataElement


def images_of(batch: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Paths of the images in a batch, and their sizes as a model sees them.

    Args:
        batch (Any): Data samples in any nesting of dicts, lists and tuples.

    Yields:
        tuple[str, tuple[int, ...]]: Path and height, width of an image;
        empty if the sample does not state them.
    """
    if isinstance(batch, BaseDataElement) and 'img_path' in batch:
        paths = batch.img_path
        for path in [paths] if isinstance(paths, str) else paths or ():
            yield path, tuple(batch.get('img_shape') or ())
    elif isinstance(batch, (BaseDataElement, Mapping)):
        yield from images_of([*batch.values()])
    elif isinstance(batch, (list, tuple)):
        for each in batch:
            yield from images_of(each)
