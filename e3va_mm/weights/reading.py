"""Read checkpoints and adapter files, wherever they are."""

import os
import re
from pathlib import Path
from typing import Any

from mmengine.fileio import get_local_path

from e3va_mm.errors import CheckpointError
from e3va_mm.frameworks.loaders import resolve
from e3va_mm.weights.adapter_file import AdapterFile
from e3va_mm.weights.downloads import read_url
from e3va_mm.weights.file_formats import read_adapter_file, read_file
from e3va_mm.weights.hub import read_folder, read_hub

ASSETS = Path(__file__).resolve().parents[1] / 'assets'


def read_checkpoint(
    path_or_url: str | os.PathLike, map_location: Any = 'cpu'
) -> dict:
    """Read a checkpoint without running anything that it may contain.

    ``.pth`` files (any file of ``torch.save``) are read with
    ``weights_only=True`` under an explicit list of allowed names, enough for
    the training checkpoints of mmengine.

    The records of a zip-format ``.pth`` are compared with their checksums; a
    file saved after ``torch.serialization.set_crc32_options(False)`` is
    therefore refused as damaged. The old format and safetensors carry none,
    so a flipped bit within the numbers of such a file goes unnoticed.

    Args:
        path_or_url: A local path (``~`` is expanded), also of a folder that
            ``save_pretrained`` of transformers wrote, an http(s) URL,
            ``hf://ORG/NAME[@REVISION][/FILE]`` of Hugging Face,
            ``e3va_mm://NAME`` for a file that comes with this package, or any
            other scheme of mmengine's ``CheckpointLoader``.
        map_location: As for ``torch.load``. For safetensors a device or its
            name; anything else means the CPU. Defaults to ``'cpu'``.

    Returns:
        What the file holds. A safetensors file gives
        ``dict(state_dict=..., meta=...)`` with its metadata as ``meta``, an
        adapter file the same as a checkpoint of mmengine.

    Raises:
        CheckpointError: If the file is missing, incomplete, damaged, not a
            checkpoint, or names anything that could run code.
    """
    address = resolve(os.fspath(path_or_url))
    if address.startswith(('http://', 'https://')):
        return read_url(address, map_location)
    if address.startswith('hf://'):
        return read_hub(address, map_location)
    if address.startswith('e3va_mm://'):
        return read_file(_asset(address), map_location)
    if address.startswith('pavi://'):
        raise CheckpointError(
            f'{address} is an address of the pavi model cloud, whose client '
            'unpickles what it reads. Download the checkpoint by hand and '
            'give its path.'
        )
    if re.match(r'(\S+:)?(s3|petrel)://', address):
        store = dict(backend='petrel')
        with get_local_path(address, backend_args=store) as path:
            return read_file(Path(path), map_location)
    if os.path.isdir(os.path.expanduser(address)):
        return read_folder(Path(address).expanduser(), map_location)
    return read_file(Path(address), map_location)


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file as what it is.

    Args:
        path: The file; ``~`` is expanded. Or ``e3va_mm://NAME``.

    Raises:
        CheckpointError: If it is missing, damaged or no adapter file.
    """
    address = os.fspath(path)
    ours = address.startswith('e3va_mm://')
    adapter = read_adapter_file(_asset(address) if ours else Path(path))
    if adapter is None:
        raise CheckpointError(
            f'{path} is no adapter file. `tools/adapter.py extract` makes '
            'one of a full checkpoint.'
        )
    return adapter


def _asset(address: str) -> Path:
    """The file of ``e3va_mm://NAME``."""
    path = (ASSETS / address.removeprefix('e3va_mm://')).resolve()
    if not path.is_relative_to(ASSETS):
        raise CheckpointError(
            f'{address} points out of the files that come with e3va_mm. '
            'Give the path of the file itself instead.'
        )
    if not path.is_file():
        names = sorted(p.name for p in ASSETS.glob('*') if p.is_file())
        raise CheckpointError(
            f'{address} is no file of e3va_mm. Available: '
            f'{", ".join(names) or "none"}.'
        )
    return path
