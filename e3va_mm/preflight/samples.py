"""Samples whose faults are named, by the file that they came from."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from PIL import Image

from e3va_mm.errors import DataError, E3VAError

SHOWN = 5  # values named in one error


class CheckedSamples:
    """Takes the place of a data set's ``prepare_data``.

    Looks at each sample where it is made, in the worker, in a part of the
    time that its decoding takes. Losses fail without a name at what it finds,
    on a GPU without a reason either.

    Args:
        prepare (Callable): The data set's own: index -> sample or None.
        dataset (object): The data set.
        option (str): The config option that it came from, for messages.
        ignored (Collection[int]): Values of a segmentation map that no class
            has, besides the data set's ``ignore_index``.
    """

    def __init__(
        self,
        prepare: Callable[[int], Any],
        dataset: object,
        option: str,
        ignored: Collection[int] = (),
    ) -> None:
        self.prepare = prepare
        self.dataset = dataset
        self.option = option
        self.ignored = {
            *ignored,
            getattr(dataset, 'ignore_index', None),
        } - {None}

    def __call__(self, index: int) -> Any:
        """Prepare a sample.

        Raises:
            DataError: If a file cannot be decoded, or a map does not fit its
                picture or has values without a class.
            Exception: What a transform fails with, if the files are whole;
                with a note that names them.
        """
        try:
            sample = self.prepare(index)
        except E3VAError:
            raise
        except Exception as error:
            self._explain(index, error)
            raise
        samples = sample.get('data_samples') if _is_packed(sample) else None
        if samples is not None:
            self._check_map(index, sample['inputs'], samples)
        return sample

    def _files(self, index: int) -> dict[str, str]:
        """Paths that a sample is made of, by their names in the data set."""
        try:
            info = dict(self.dataset.get_data_info(index))
        # What it knows only helps a message, and data sets of videos take
        # other indices than their samples have.
        except Exception:
            return {}
        return {
            key: path
            for key, path in info.items()
            if isinstance(key, str)
            and key.endswith('_path')
            and isinstance(path, str)
        }

    def _explain(self, index: int, error: Exception) -> None:
        """Say which file a transform has failed over."""
        files = self._files(index)
        for path in files.values():
            # Of one pixel a side transforms make a list.
            fault = decoding_fault(path, least=2)
            if fault is not None:
                raise DataError(
                    f'{self.option}: {path} {fault}. Copy the file again, or '
                    'take it out of the data.'
                ) from error
        note = f'This was sample {index} of {self.option}: {files}'
        if hasattr(error, 'add_note'):  # Python >= 3.11
            error.add_note(note)

    def _check_map(self, index: int, inputs: Any, samples: Any) -> None:
        field = getattr(samples, 'gt_sem_seg', None)
        data = getattr(field, 'data', None)
        if not isinstance(data, torch.Tensor):
            return
        files = self._files(index)
        path = files.get('seg_map_path', files.get('img_path'))
        size = tuple(inputs.shape[-2:])
        if tuple(data.shape) != (1, *size):
            raise DataError(
                f'{self.option}: the map {path} has the shape '
                f'{_size(data)} beside a picture of {size} after the '
                'pipeline. Expected one value for each pixel: give a map of '
                f'the size of {files.get("img_path")}, with one channel.'
            )
        classes = len(self.dataset.metainfo.get('classes') or ())
        if not data.numel():
            return
        least, most = torch.aminmax(data)
        if not classes or (least >= 0 and most < classes):
            return
        wrong = (data < 0) | (data >= classes)
        for value in self.ignored:
            wrong &= data != value
        if wrong.any():
            values = data[wrong].unique().tolist()
            raise DataError(
                f'{self.option}: the map {path} has values that no class has: '
                f'{_first(values)}. There are {classes} classes, 0 to '
                f'{classes - 1}, and {sorted(self.ignored)} for none. Correct '
                f'the map or {self.option}.metainfo, .reduce_zero_label or '
                '.ignore_index.'
            )


def decoding_fault(path: str, least: int = 1) -> str | None:
    """Why a picture cannot be decoded as a whole, None if it can.

    Bytes after its end do no harm.

    Args:
        path (str): The file.
        least (int): Pixels that each side should have. Defaults to 1.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if min(image.size) < least:
                return f'is {image.width} x {image.height} pixels'
    # A malformed file can make a decoder fail in any way.
    except Exception as error:
        return f'cannot be decoded, {error}'
    return None


def _is_packed(sample: Any) -> bool:
    """Whether it is a picture with its annotations, and not several."""
    return isinstance(sample, Mapping) and isinstance(
        sample.get('inputs'), torch.Tensor
    )


def _size(data: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(data.shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _first(values: list) -> str:
    more = len(values) - SHOWN
    shown = ', '.join(map(str, values[:SHOWN]))
    return f'{shown} and {more} more' if more > 0 else shown
