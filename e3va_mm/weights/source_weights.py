"""The weights of a trunk as they came, while it stores them coarser."""

import tempfile
from collections.abc import Iterator, Mapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from e3va_mm.errors import CheckpointError
from e3va_mm.utils.sizes import MIB


class SourceWeights(Mapping[str, Tensor]):
    """Tensors in an unnamed temporary file: they take disk, no memory.

    Nobody else sees the file, and the system removes it with the process,
    however that ends.

    Args:
        tensors (Mapping[str, Tensor]): What to keep.

    Raises:
        CheckpointError: If the temporary folder has no room.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Read once as long as somebody has it, as several models on one trunk.
        self._alive: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        offset = 0
        try:
            self._file = tempfile.TemporaryFile()
            for name, tensor in tensors.items():
                self._places[name] = offset, tensor.dtype, tensor.shape
                self._file.write(_bytes(tensor.detach().cpu().contiguous()))
                offset += tensor.nbytes
            self._file.flush()
        except OSError as error:
            size = sum(t.nbytes for t in tensors.values()) / MIB
            # None where no folder could be written to.
            folder = tempfile.tempdir or 'the temporary folder'
            raise CheckpointError(
                f'Expected {size:,.0f} MiB of room in {folder} for the source '
                f'weights of the trunk, but writing failed: {error}. Set the '
                'environment variable TMPDIR to a folder with room, or leave '
                'out `trunk_weights`.'
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._alive.get(name)
        if tensor is None:
            offset, dtype, shape = self._places[name]
            tensor = torch.empty(shape, dtype=dtype)
            self._file.seek(offset)
            self._file.readinto(_bytes(tensor))
            self._alive[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, memo: dict) -> 'SourceWeights':
        return self  # it never changes

    def __reduce__(self) -> tuple:
        return SourceWeights, (dict(self),)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
