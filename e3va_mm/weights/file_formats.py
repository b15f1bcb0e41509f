"""Read a checkpoint file of any format, or say why not.

Files of ``torch.save`` go through :mod:`.safe_pickle` and never fall back to
plain unpickling; safetensors files hold no code at all.
"""

import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from safetensors import safe_open
from torch import Tensor

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import safe_pickle
from e3va_mm.weights.adapter_file import AdapterFile
from e3va_mm.weights.unwrapping import state_of

_FETCH_AGAIN = (
    'Fetch or copy the file again and compare its size with the original.'
)
# Bytes that expanded tensors of a small file may stand for, all together.
EXPANDED = 64 * 2**20
_UNTRUSTED = (
    'Do not unpickle this file. Ask its author for the weights alone, saved '
    'as .safetensors or as a plain state dict.'
)


def read_file(path: Path, map_location: Any) -> dict:
    """Read a local file, whatever its format; ``~`` is expanded.

    Args:
        path: The file. Its format is told by its content; only the ending
            ``.safetensors`` is believed.
        map_location: As for ``torch.load``. For safetensors a device or its
            name; anything else means the CPU.

    Returns:
        What the file holds. A safetensors file gives
        ``dict(state_dict=..., meta=...)`` with its metadata as ``meta``, an
        adapter file the same as a checkpoint of mmengine.

    Raises:
        CheckpointError: If the file is missing, incomplete, damaged, not a
            checkpoint, or names anything that could run code.
    """
    path, head = _begin(path)
    if not _is_safetensors(path, head):
        content = _read_pickle(path, head, map_location)
        _drop_program(path, content.get('meta'))
        return content
    tensors, meta = _read_safetensors(path, map_location)
    adapter = AdapterFile.parse(path, tensors, meta)
    if adapter is not None:
        return adapter.checkpoint(path)
    _drop_program(path, meta)
    return {'state_dict': tensors, 'meta': meta}


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file as what it is.

    Args:
        path: The file; ``~`` is expanded.

    Raises:
        CheckpointError: If it is missing, damaged or no adapter file.
    """
    path, head = _begin(Path(path))
    adapter = None
    if _is_safetensors(path, head):
        adapter = AdapterFile.parse(path, *_read_safetensors(path, 'cpu'))
    if adapter is None:
        raise CheckpointError(
            f'{path} is no adapter file. `tools/adapter.py extract` makes '
            'one of a full checkpoint.'
        )
    return adapter


def _drop_program(path: Path, meta: Any) -> None:
    """Drop the one text of a checkpoint that mmengine runs in a resume.

    It is the config of a run of mmcv, taken for Python. mmengine itself
    writes ``cfg``, which a resume leaves alone.
    """
    if isinstance(meta, dict) and meta.pop('config', None) is not None:
        print_log(
            f'{path}: its `meta.config` was left out, for mmengine would run '
            'it as a program in a resume. All else was read.',
            logger='current',
            level=logging.WARNING,
        )


def _begin(path: Path) -> tuple[Path, bytes]:
    """The path of a file that is there, and its first bytes."""
    try:
        path = path.expanduser()
    except RuntimeError as error:  # `~NAME` of nobody
        raise CheckpointError(f'{path}: {error}') from error
    try:
        there = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(
            f'{str(path)[:200]}: {error.strerror}. Correct the path of the '
            'checkpoint file.'
        ) from error
    if not there:
        what = 'is a folder' if path.is_dir() else 'does not exist'
        where = '' if path.is_absolute() else f' in {Path.cwd()}'
        raise CheckpointError(
            f'{path} {what}{where}. Correct the path of the checkpoint file, '
            'or make it absolute.'
        )
    try:
        with path.open('rb') as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(
            f'{path} cannot be read: {error.strerror}. Check its permissions '
            'and the disk that it is on.'
        ) from error
    if not head:
        raise CheckpointError(f'{path} is empty (0 bytes). {_FETCH_AGAIN}')
    return path, head


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], 'little')
    return path.suffix == '.safetensors' or (
        head[8:9] == b'{' and length + 8 <= path.stat().st_size
    )


def _read_safetensors(
    path: Path, map_location: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    plain = isinstance(map_location, str | torch.device)
    device = str(map_location) if plain else 'cpu'
    try:
        with safe_open(path, framework='pt', device=device) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            meta = dict(file.metadata() or {})
    except Exception as error:
        raise CheckpointError(
            f'{path} cannot be read as a safetensors file: {error}. '
            f'{_FETCH_AGAIN}'
        ) from error
    return tensors, meta


def _read_pickle(path: Path, head: bytes, map_location: Any) -> dict:
    try:
        _check_archive(path, head)
        content = safe_pickle.load(path, map_location)
    except CheckpointError:
        raise
    # A file can make the reader fail in any way: all of them are its fault.
    # The cause is not chained, for torch's text advises plain unpickling.
    except Exception as error:
        raise CheckpointError(f'{path} {_explain(error, head)}') from None
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f'{path} holds a {type(content).__name__} without weights, not '
            'the dict of a checkpoint. Give a state dict, or a dict with one '
            'under `state_dict` or `model`.'
        )
    _check_states(path, content, str(map_location) == 'meta')
    return content


def _check_states(path: Path, content: dict, bare: bool) -> None:
    """Refuse what is no state of a model where loaders expect one.

    Args:
        path: The file.
        content: What it holds.
        bare: Whether tensors were asked for without their numbers.
    """
    state = content.get('state_dict', {})
    if not isinstance(state, dict):
        raise CheckpointError(
            f'{path} holds a {type(state).__name__} under `state_dict`, not '
            'the tensors of a model by their names. Save the state dict of '
            'the model there.'
        )
    for what in _oddities(content, path.stat().st_size, bare):
        raise CheckpointError(
            f'{path} holds a tensor {what}. Expected are plain tensors by '
            'their names: save the state dict of the model as it is in '
            'memory, on the CPU.'
        )


def _oddities(content: dict, size: int, bare: bool) -> Iterator[str]:
    """What is odd about the tensors of a file of ``size`` bytes."""
    # Other parts, as the state of an optimizer, may have numbers for names.
    # The first is what mmengine loads, the second what trunks are read from.
    for state in content.get('state_dict', content), state_of(content):
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(name, str):
                yield f'under {name!r}, which is no name'
    # What is saved expanded is wider than its storage: one number could stand
    # for a tensor that no memory holds. What a copy of all such tensors takes
    # beyond their storages is at most the file's size, or EXPANDED.
    room = max(size, EXPANDED)
    for name, value in _tensors_in(content):
        what = _oddity(name, value, bare)
        if what is not None:
            yield what
        elif not value.is_meta:
            stored = value.untyped_storage().nbytes()
            room -= max(0, value.nbytes - stored)
            if stored > size or room < 0:
                yield f'{name!r} of {value.nbytes:,} bytes, more than the file'


def _tensors_in(content: Any) -> Iterator[tuple[Any, Tensor]]:
    """Tensors in containers, each with the last of its keys."""
    waiting, seen = [(None, content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.items()
            elif isinstance(value, (list, tuple)):
                waiting += ((str(i), each) for i, each in enumerate(value))


def _oddity(name: Any, value: Tensor, bare: bool) -> str | None:
    """Why a tensor is no plain array of a file's numbers, if it is none."""
    if value.is_nested or value.layout is not torch.strided:
        return f'{name!r} that is nested or sparse'
    if value.is_quantized:
        return f'{name!r} that is quantised'
    if value.is_meta:
        return None if bare else f'{name!r} without numbers'
    return None


def _check_archive(path: Path, head: bytes) -> None:
    """Refuse what is no complete file of ``torch.save``, before reading it.

    Old versions of torch hand TorchScript and tar archives to readers that
    know no ``weights_only``; and torch does not compare the checksums.
    """
    if head.startswith(b'PK'):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f'{path} is incomplete: it ends after {path.stat().st_size} '
                f'bytes without the index of a checkpoint. {_FETCH_AGAIN}'
            )
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {Path(record.filename).name for record in records}
            plain = not any(
                record.compress_type != zipfile.ZIP_STORED
                # Marked as a folder, torch takes whatever is in memory for it.
                or record.external_attr & 0x10
                for record in records
            )
            claimed = sum(record.file_size for record in records)
            # Else a small file could stand for any number of bytes.
            whole = plain and claimed <= path.stat().st_size
            damaged = archive.testzip() if whole else None
        if 'constants.pkl' in names:
            raise CheckpointError(
                f'{path} is a TorchScript program, not a checkpoint. Give '
                'the state dict that it was made from.'
            )
        if 'data.pkl' not in names:
            raise CheckpointError(
                f'{path} is a zip archive, but no checkpoint of torch.save. '
                'Unpack it and give the checkpoint inside.'
            )
        if not whole:
            raise CheckpointError(
                f'{path} has records that are compressed, folders, or larger '
                'than the file, which torch.save does not write. Save the '
                'weights again.'
            )
        if damaged:
            raise CheckpointError(
                f'{path} is damaged: the checksum of its record {damaged} is '
                f'wrong. {_FETCH_AGAIN}'
            )
    elif tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive, which cannot be read safely. Unpack '
            'it, or save the weights again with a current torch.'
        )


def _explain(error: Exception, head: bytes) -> str:
    """Say in words why ``torch.load`` refused a file, and what to do."""
    text = str(error)
    forbidden = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', text)
    if forbidden:
        return (
            f'names {forbidden[1]}, which is not on the list of what a '
            'checkpoint may hold; it could run code and was not read. '
            f'{_UNTRUSTED}'
        )
    if 'map_location' in text:
        return (
            'holds tensors of a device that this machine does not have. '
            "Read it with map_location='cpu'."
        )
    if head[:1] == b'\x80' and head[1:2] > b'\x02':
        return (
            f'is a pickle of protocol {head[1]}, which torch.save does not '
            f'write and which is not read. {_UNTRUSTED}'
        )
    start = head.decode('utf-8', errors='ignore').strip()
    if start and all(c.isprintable() or c.isspace() for c in start):
        return (
            f'is a text file (it begins with {start[:40]!r}), most likely an '
            'error page or a Git LFS pointer in place of the checkpoint. '
            f'{_FETCH_AGAIN}'
        )
    detail = text.split('WeightsUnpickler error:')[-1].strip()
    first_line = detail.splitlines()[0] if detail else ''
    return (
        'cannot be read as a checkpoint: '
        f'{type(error).__name__}: {first_line}. {_FETCH_AGAIN}'
    )
