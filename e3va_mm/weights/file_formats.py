"""Read a checkpoint file of any format, or say why not.

Files of ``torch.save`` go through :mod:`.safe_pickle` and never fall back to
plain unpickling; safetensors files hold no code at all.
"""

import logging
import re
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
from e3va_mm.weights.state_dicts import state_of

# Bytes that expanded tensors of a small file may stand for, all together.
EXPANDED = 64 * 2**20
FETCH_AGAIN = (
    'Fetch or copy the file again and compare its size with the original.'
)
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
        What the file holds, see :func:`.reading.read_checkpoint`.

    Raises:
        CheckpointError: If the file is missing, incomplete, damaged, not a
            checkpoint, or names anything that could run code.
    """
    path, head = _begin(path)
    if _is_safetensors(path, head):
        tensors, meta = _read_safetensors(path, map_location)
        adapter = AdapterFile.parse(path, tensors, meta)
        if adapter is not None:
            return adapter.checkpoint(path)
        content = {'state_dict': tensors, 'meta': meta}
    else:
        content = _read_pickle(path, head, map_location)
    # The config of a run of mmcv. What mmengine writes, `cfg`, is left alone.
    meta = content.get('meta')
    if isinstance(meta, dict) and meta.pop('config', None) is not None:
        print_log(
            f'{path}: its `meta.config` was left out, for mmengine would run '
            'it as a program in a resume. All else was read.',
            logger='current',
            level=logging.WARNING,
        )
    return content


def read_adapter_file(path: Path) -> AdapterFile | None:
    """Read an adapter file as what it is; None if it is another file."""
    path, head = _begin(path)
    if not _is_safetensors(path, head):
        return None
    return AdapterFile.parse(path, *_read_safetensors(path, 'cpu'))


def _begin(path: Path) -> tuple[Path, bytes]:
    """The path of a file that is there, and its first bytes."""
    head = None
    try:
        path = path.expanduser()
        if path.is_file():  # and no pipe, which would wait
            with path.open('rb') as file:
                head = file.read(64)
    # A long name, no permission; `~NAME` of nobody.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f'{str(path)[:200]} cannot be read: '
            f'{getattr(error, "strerror", None) or error}. Check the path of '
            'the checkpoint file, and its permissions.'
        ) from error
    if head is None:
        what = 'is no file' if path.exists() else 'does not exist'
        where = '' if path.is_absolute() else f' in {Path.cwd()}'
        raise CheckpointError(
            f'{path} {what}{where}. Correct the path of the checkpoint file, '
            'or make it absolute.'
        )
    if not head:
        raise CheckpointError(f'{path} is empty (0 bytes). {FETCH_AGAIN}')
    return path, head


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], 'little')
    return path.suffix == '.safetensors' or (
        head[8:9] == b'{' and length + 8 <= path.stat().st_size
    )


def _read_safetensors(
    path: Path, map_location: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    known = isinstance(map_location, str | torch.device)
    device = str(map_location) if known else 'cpu'
    try:
        with safe_open(path, framework='pt', device=device) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, dict(file.metadata() or {})
    except Exception as error:
        raise CheckpointError(
            f'{path} cannot be read as a safetensors file: {error}. '
            f'{FETCH_AGAIN}'
        ) from error


def _read_pickle(path: Path, head: bytes, map_location: Any) -> dict:
    try:
        if head.startswith(b'PK'):
            _check_archive(path)
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
    state = content.get('state_dict', {})
    if not isinstance(state, dict):
        raise CheckpointError(
            f'{path} holds a {type(state).__name__} under `state_dict`, not '
            'the tensors of a model by their names. Save the state dict of '
            'the model there.'
        )
    bare = str(map_location) == 'meta'
    for fault in _faults(content, path.stat().st_size, bare):
        raise CheckpointError(
            f'{path} holds a tensor {fault}. Expected are plain tensors by '
            'their names: save the state dict of the model as it is in '
            'memory, on the CPU.'
        )
    return content


def _check_archive(path: Path) -> None:
    """Refuse a zip file that torch.save has not written, before reading it.

    torch does not compare checksums; it takes whatever is in memory for a
    record that is marked as a folder, and a small file could stand for any
    number of bytes by compressed records.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f'{path} is incomplete: it ends after {path.stat().st_size} '
            f'bytes without the index of a checkpoint. {FETCH_AGAIN}'
        )
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        whole = sum(r.file_size for r in records) <= path.stat().st_size
        stored = all(
            record.compress_type == zipfile.ZIP_STORED
            and not record.external_attr & 0x10
            for record in records
        )
        damaged = archive.testzip() if whole and stored else None
    if 'data.pkl' not in {Path(record.filename).name for record in records}:
        raise CheckpointError(
            f'{path} is a zip archive, but no checkpoint of torch.save. '
            'Unpack it and give the checkpoint inside.'
        )
    if damaged:
        raise CheckpointError(
            f'{path} is damaged: the checksum of its record {damaged} is '
            f'wrong. {FETCH_AGAIN}'
        )
    program = any(Path(r.filename).name == 'constants.pkl' for r in records)
    if not (whole and stored or program):  # of which torch says what it is
        raise CheckpointError(
            f'{path} has records that are compressed, folders, or larger '
            'than the file, which torch.save does not write. Save the '
            'weights again.'
        )


def _faults(content: dict, size: int, bare: bool) -> Iterator[str]:
    """What is wrong with the tensors of a file.

    Args:
        content: What it holds.
        size: Its bytes.
        bare: Whether tensors were asked for without their numbers.
    """
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
        if value.is_nested or value.layout is not torch.strided:
            yield f'{name!r} that is nested or sparse'
        elif value.is_quantized:
            yield f'{name!r} that is quantised'
        elif value.is_meta and not bare:
            yield f'{name!r} without numbers'
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
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            inner = (
                value if isinstance(value, dict) else dict(enumerate(value))
            )
            waiting += inner.items()


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
    if 'TorchScript' in text:
        return (
            'is a TorchScript program, not a checkpoint. Give the state dict '
            'that it was made from.'
        )
    if '.tar format' in text:
        return (
            'is a tar archive, which cannot be read safely. Unpack it, or '
            'save the weights again with a current torch.'
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
            f'{FETCH_AGAIN}'
        )
    detail = text.split('WeightsUnpickler error:')[-1].strip()
    return (
        f'cannot be read as a checkpoint: {type(error).__name__}: '
        f'{detail.partition(chr(10))[0]}. {FETCH_AGAIN}'
    )
