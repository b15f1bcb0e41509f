"""Checks of single samples while training, which name the file."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from e3va_mm.errors import DataError, E3VAError
from e3va_mm.preflight.problems import Problem, raise_errors
from e3va_mm.preflight.reading import decoding_fault, paths_in
from e3va_mm.utils.listing import listed

LEAST_SIDE = 32  # the largest stride of most models


class CheckedSamples:
    """Takes the place of a data set's ``prepare_data``.

    Looks at each sample where it is made, in the worker. Losses fail without
    a name at what it finds, on a GPU without a reason either.

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
        own = getattr(dataset, 'ignore_index', None)
        self.ignored = {*ignored, own} - {None}

    def __call__(self, index: int) -> Any:
        """Prepare a sample.

        Raises:
            DataError: If a file cannot be reached or decoded, or a map does
                not fit its image or has values without a class.
            Exception: What a transform fails with, if the files are whole;
                with a note that names them.
        """
        try:
            sample = self.prepare(index)
        except E3VAError:
            raise
        except Exception as error:
            files = self._files(index)
            for key, path in files.items():
                # The first error knows how another was sought.
                if key == 'xml_path' or not os.path.exists(path):
                    continue
                # Of one pixel a side transforms make a list.
                fault = decoding_fault(path, least=2)
                if fault:
                    raise DataError(
                        f'{path}: {fault}; expected a whole image for '
                        f'{self.option}.\nCopy the file again, or take it out '
                        'of the data.'
                    ) from error
            if isinstance(error, OSError) and files:
                raise DataError(
                    f'{self.option}: sample {index} cannot be read: '
                    f'{type(error).__name__}: {error}; expected files that '
                    f'its loaders reach: {", ".join(files.values())}.\n'
                    'Check the address, the network and `backend_args`.'
                ) from error
            note = f'This was sample {index} of {self.option}: {files}'
            add_note(error, note)
            raise
        fault = isinstance(sample, Mapping) and self._map_fault(
            sample.get('inputs'), sample.get('data_samples')
        )
        if fault:
            files = self._files(index)
            path = files.get('seg_map_path', files.get('img_path'))
            raise DataError(f'{self.option}: {path}: {fault}')
        return sample

    def _files(self, index: int) -> dict[str, str]:
        """Paths that a sample is made of, by their names in the data set."""
        try:
            return paths_in(self.dataset.get_data_info(index))
        # It only helps a message, and data sets of videos take other indices.
        except Exception:
            return {}

    def _map_fault(self, inputs: Any, data_sample: Any) -> str | None:
        data = getattr(getattr(data_sample, 'gt_sem_seg', None), 'data', None)
        if not (torch.is_tensor(inputs) and torch.is_tensor(data)):
            return None
        size = inputs.shape[-2:]
        if data.shape != (1, *size):
            shape = tuple(data.shape)
            return (
                'after the pipeline the map has the shape '
                f'{shape[1:] if shape[:1] == (1,) else shape}; expected '
                f'{tuple(size)}, one value for each pixel.\nGive a map of the '
                'size of its image, with one channel.'
            )
        classes = len(self.dataset.metainfo.get('classes') or ())
        wrong = (data < 0) | (data >= classes)
        if not classes or not wrong.any():
            return None
        for value in self.ignored:
            wrong &= data != value
        values = [*map(str, data[wrong].unique().tolist())]
        return values and (
            f'the map has values that no class has: {listed(values, 5)}; '
            f'expected 0 to {classes - 1} for the {classes} classes and '
            f'{sorted(self.ignored)} for none.\nCorrect the map or '
            f'{self.option}.metainfo, .reduce_zero_label or .ignore_index.'
        )


def check_batch(
    batch: Sequence[tuple[str, tuple[int, ...]]], cause: Exception
) -> None:
    """Look whether a step failed over images that are too small.

    Args:
        batch (Sequence): ``batch`` of the DatasetCheckHook: paths and sizes.
        cause (Exception): What the step failed with; takes a note of the
            images if they are not the reason.

    Raises:
        DataError: If an image is smaller than one cell of a coarse map.
    """
    advice = (
        f'The step failed over these images ({type(cause).__name__}: {cause}).'
        ' Take them out of the data (mmdet: filter_cfg=dict(min_size=...)), '
        'or let Resize enlarge them.'
    )
    small = [
        Problem(
            path,
            f'{size[0]} x {size[1]} pixels reach the model',
            f'at least {LEAST_SIDE} a side',
            advice,
        )
        for path, size in batch
        if size and min(size[:2]) < LEAST_SIDE
    ]
    raise_errors(small, cause)
    if batch:
        add_note(cause, f'The images of the batch: {batch}')


def add_note(error: Exception, note: str) -> None:
    """Add a note where Python can (from 3.11 on)."""
    if hasattr(error, 'add_note'):
        error.add_note(note)
