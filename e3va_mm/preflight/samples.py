"""Checks of single samples while training, which name the file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from e3va_mm.errors import E3VAError
from e3va_mm.preflight.files import decoding_fault, paths_in
from e3va_mm.preflight.problems import Problem, raise_errors
from e3va_mm.utils.listing import listed

LEAST_SIDE = 32  # the largest stride of most models


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
        own = getattr(dataset, 'ignore_index', None)
        self.ignored = {*ignored, own} - {None}

    def __call__(self, index: int) -> Any:
        """Prepare a sample.

        Raises:
            DataError: If a file cannot be decoded, or a map does not fit its
                image or has values without a class.
            Exception: What a transform fails with, if the files are whole;
                with a note that names them.
        """
        try:
            sample = self.prepare(index)
        except E3VAError:
            raise
        except Exception as error:
            files = self._files(index)
            # Of one pixel a side transforms make a list.
            raise_errors(
                (
                    Problem(
                        path,
                        fault,
                        f'a whole image for {self.option}',
                        'Copy the file again, or take it out of the data.',
                    )
                    for path in files.values()
                    if (fault := decoding_fault(path, least=2))
                ),
                error,
            )
            add_note(
                error,
                f'This was sample {index} of {self.option}: {files}',
            )
            raise
        if isinstance(sample, Mapping):
            inputs = sample.get('inputs')
            field = getattr(sample.get('data_samples'), 'gt_sem_seg', None)
            data = getattr(field, 'data', None)
            if torch.is_tensor(inputs) and torch.is_tensor(data):
                self._check_map(self._files(index), inputs.shape[-2:], data)
        return sample

    def _files(self, index: int) -> dict[str, str]:
        """Paths that a sample is made of, by their names in the data set."""
        try:
            return paths_in(self.dataset.get_data_info(index))
        # What it knows only helps a message, and data sets of videos take
        # other indices than their samples have.
        except Exception:
            return {}

    def _check_map(
        self, files: Mapping[str, str], size: torch.Size, data: torch.Tensor
    ) -> None:
        path = files.get('seg_map_path', files.get('img_path'))
        if data.shape != (1, *size):
            shape = tuple(data.shape)
            raise_errors(
                [
                    Problem(
                        f'{self.option}: {path}',
                        'after the pipeline the map has the shape '
                        f'{shape[1:] if shape[:1] == (1,) else shape}',
                        f'{tuple(size)}, one value for each pixel',
                        'Give a map of the size of '
                        f'{files.get("img_path")}, with one channel.',
                    )
                ]
            )
        classes = len(self.dataset.metainfo.get('classes') or ())
        if not classes or not data.numel():
            return
        least, most = torch.aminmax(data)
        if least >= 0 and most < classes:
            return
        wrong = (data < 0) | (data >= classes)
        for value in self.ignored:
            wrong &= data != value
        if wrong.any():
            values = [str(value) for value in data[wrong].unique().tolist()]
            raise_errors(
                [
                    Problem(
                        f'{self.option}: {path}',
                        f'the map has values that no class has: '
                        f'{listed(values, 5)}',
                        f'0 to {classes - 1} for the {classes} classes and '
                        f'{sorted(self.ignored)} for none',
                        f'Correct the map or {self.option}.metainfo, '
                        '.reduce_zero_label or .ignore_index.',
                    )
                ]
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
    raise_errors(
        (
            Problem(
                path,
                f'{size[0]} x {size[1]} pixels reach the model',
                f'at least {LEAST_SIDE} a side',
                f'The step failed over these images ({type(cause).__name__}: '
                f'{cause}). Take them out of the data (mmdet: '
                'filter_cfg=dict(min_size=...)), or let Resize enlarge them.',
            )
            for path, size in batch
            if size and min(size[:2]) < LEAST_SIDE
        ),
        cause,
    )
    add_note(cause, f'The images of the batch: {batch}')


def add_note(error: Exception, note: str) -> None:
    """Add a note where Python can (from 3.11 on)."""
    if hasattr(error, 'add_note'):
        error.add_note(note)
