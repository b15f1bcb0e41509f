"""The only door for checkpoint files.

A ``.pth`` file is a pickle, and unpickling can run any code. Everything here
reads such a file with ``torch.load(weights_only=True)`` under one explicit
list of allowed names and never falls back to plain unpickling. What cannot be
read that way is refused with a :class:`~e3va_mm.errors.CheckpointError`.

:func:`register_safe_loaders` puts the door in front of every checkpoint path
of mmengine, so ``init_cfg``, ``load_from``, ``resume`` and the frameworks'
inference functions use it too.
"""

import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import checkpoint as mm_checkpoint
from mmengine.utils import digit_version
from safetensors import safe_open

from e3va_mm.errors import CheckpointError

ASSETS = Path(__file__).resolve().parents[1] / 'assets'

# The convention of PyTorch and OpenMMLab: the first digits of the SHA-256 at
# the end of the name. Eight digits that read as a date are not a hash.
_HASH = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')

_FETCH_AGAIN = (
    'Fetch or copy the file again and compare its size with the original'
)
_UNTRUSTED = (
    'Do not unpickle this file. Ask its author for the weights alone, saved '
    'as .safetensors or as a plain state dict'
)


# --------------------------------------------------------------------------
# What a pickle may name beyond torch's own tensors and containers
# --------------------------------------------------------------------------
class _SavedDtype:
    """Stands in for ``numpy.dtype``: numbers and strings, never objects.

    The real class must not be allowed: its ``__setstate__`` lets a file clear
    the flags of an object dtype, and an array of such a dtype takes any bytes
    of the file for pointers.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufcSU]\d+', code):
            raise UnpicklingError(
                f'a numpy array of dtype {code!r}; only numbers and strings '
                'are read'
            )
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _SavedArray:
    """Stands in for numpy's array constructor; keeps the array it built."""

    def __init__(self, *args: Any):
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        order = 'F' if fortran else 'C'
        self.array = _saved_values(shape, dtype, data, order)


class _SavedHistory:
    """Stands in for mmengine's ``HistoryBuffer``; keeps its state.

    The real ``__setstate__`` would let a file replace the statistics methods
    that all buffers of the process share.
    """

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _SavedOneCycle:
    """Stands in for ``OneCycleParamScheduler`` as the owner of a method."""


def _saved_values(
    shape: tuple, dtype: _SavedDtype, data: bytes, order: str = 'C'
) -> np.ndarray:
    array = np.ndarray(shape, dtype.numpy, data, order=order)
    if array.nbytes != len(data):
        raise UnpicklingError(
            f'a numpy array of {array.nbytes} bytes with {len(data)} bytes '
            'of data'
        )
    return array.copy(order=order)


def _saved_scalar(dtype: _SavedDtype, data: bytes) -> np.generic:
    return _saved_values((), dtype, data)[()]


def _saved_method(owner: Any, name: str) -> Callable | None:
    """Stands in for ``getattr``, which pickles use to name methods.

    Only two uses are known: the statistics methods of a history buffer, which
    are the class's and not the file's, and the annealing function of a
    one-cycle schedule.
    """
    if owner is _SavedHistory:
        return None
    if owner is _SavedOneCycle and name in (
        '_annealing_cos',
        '_annealing_linear',
    ):
        return getattr(OneCycleParamScheduler, name)
    raise UnpicklingError(f'GLOBAL getattr is refused for {name!r}')


# Found by trying with the checkpoints of mmengine's Runner. Every name but
# ``bytes`` is answered by a class or function of this file, so neither
# mmengine's nor numpy's own unpickling code runs.
_ALLOWED = [
    # the message hub's record of losses and learning rates ...
    (_SavedHistory, 'mmengine.logging.history_buffer.HistoryBuffer'),
    # ... which names its statistics methods by getattr(HistoryBuffer, ...)
    (_saved_method, 'builtins.getattr'),
    # ... as the state of OneCycleLR names its annealing function
    (
        _SavedOneCycle,
        'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
    ),
    # arrays and scalars (best scores, histories) under the names of numpy 1
    (_SavedArray, 'numpy.core.multiarray._reconstruct'),
    (_saved_scalar, 'numpy.core.multiarray.scalar'),
    # ... and of numpy 2
    (_SavedArray, 'numpy._core.multiarray._reconstruct'),
    (_saved_scalar, 'numpy._core.multiarray.scalar'),
    # the arguments of the four above
    (_SavedArray, 'numpy.ndarray'),
    (_SavedDtype, 'numpy.dtype'),
    # the data of an empty array: protocol 2 writes b'' as bytes()
    (bytes, 'builtins.bytes'),
]


def _restore(value: Any) -> Any:
    """Replace what the stand-ins kept by the real objects, in place."""
    if isinstance(value, dict):
        for key in value:
            value[key] = _restore(value[key])
    elif isinstance(value, list):
        value[:] = map(_restore, value)
    elif type(value) is tuple:
        value = tuple(map(_restore, value))
    elif isinstance(value, _SavedArray):
        value = value.array
    elif isinstance(value, _SavedHistory):
        state = _restore(value.state)
        value = HistoryBuffer(
            state['_log_history'], state['_count_history'], state['max_length']
        )
    return value


@contextmanager
def _only_our_list() -> Iterator[None]:
    """Allow the names of this file and no other for one reading.

    Other packages may have added to torch's list, which is global.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


# --------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------
def _refuse(
    path: Any, cause: str, step: str, error: Exception | None = None
) -> NoReturn:
    raise CheckpointError(f'{path} {cause}. {step}.') from error


def _check_archive(path: Path, head: bytes) -> None:
    """Refuse what is no complete file of ``torch.save``, before reading it.

    Old versions of torch hand TorchScript and tar archives to readers that
    know no ``weights_only``; and torch does not compare the checksums.
    """
    if head.startswith(b'PK'):
        if not zipfile.is_zipfile(path):
            _refuse(
                path,
                f'is incomplete: it ends after {path.stat().st_size} bytes '
                'without the index of a checkpoint',
                _FETCH_AGAIN,
            )
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
            damaged = archive.testzip()
        if 'constants.pkl' in names:
            _refuse(
                path,
                'is a TorchScript program, not a checkpoint',
                'Give the state dict that it was made from',
            )
        if 'data.pkl' not in names:
            _refuse(
                path,
                'is a zip archive, but no checkpoint of torch.save',
                'Unpack it and give the checkpoint inside',
            )
        if damaged:
            _refuse(
                path,
                f'is damaged: the checksum of its record {damaged} is wrong',
                _FETCH_AGAIN,
            )
    elif tarfile.is_tarfile(path):
        _refuse(
            path,
            'is a tar archive, which cannot be read safely',
            'Unpack it, or save the weights again with a current torch',
        )


def _cause(error: Exception, head: bytes) -> tuple[str, str]:
    """Say in words why ``torch.load`` refused a file, and what to do."""
    text = str(error)
    forbidden = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', text)
    if forbidden:
        return (
            f'names {forbidden[1]}, which is not on the list of what a '
            'checkpoint may hold; it could run code and was not read',
            _UNTRUSTED,
        )
    if 'map_location' in text:
        return (
            'holds tensors of a device that this machine does not have',
            "Read it with map_location='cpu'",
        )
    if head[:1] == b'\x80' and head[1:2] > b'\x02':
        return (
            f'is a pickle of protocol {head[1]}, which torch.save does not '
            'write and which is not read',
            _UNTRUSTED,
        )
    start = head.decode('utf-8', errors='ignore').strip()
    if start and all(c.isprintable() or c.isspace() for c in start):
        return (
            f'is a text file (it begins with {start[:40]!r}), most likely an '
            'error page or a Git LFS pointer in place of the checkpoint',
            _FETCH_AGAIN,
        )
    detail = text.split('WeightsUnpickler error:')[-1].strip()
    return (
        'cannot be read as a checkpoint: '
        f'{type(error).__name__}: {detail.splitlines()[0] if detail else ""}',
        _FETCH_AGAIN,
    )


def _read_pickle(path: Path, head: bytes, map_location: Any) -> dict:
    try:
        _check_archive(path, head)
        # The list needs names for its entries, which torch has since 2.6.
        if digit_version(torch.__version__) < digit_version('2.6.0'):
            content = torch.load(path, map_location, weights_only=True)
        else:
            with _only_our_list():
                content = torch.load(path, map_location, weights_only=True)
            content = _restore(content)
    except CheckpointError:
        raise
    # A file can make the reader fail in any way: all of them are its fault.
    # The cause is not chained, for torch's text advises plain unpickling.
    except Exception as error:
        _refuse(path, *_cause(error, head))
    if not isinstance(content, dict) or not content:
        _refuse(
            path,
            f'holds a {type(content).__name__} without weights, not the dict '
            'of a checkpoint',
            'Give a state dict, or a dict with one under `state_dict` or '
            '`model`',
        )
    return content


def _read_safetensors(path: Path, map_location: Any) -> dict:
    plain = isinstance(map_location, str | torch.device)
    device = str(map_location) if plain else 'cpu'
    try:
        with safe_open(path, framework='pt', device=device) as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}
            meta = dict(file.metadata() or {})
    except Exception as error:
        _refuse(
            path,
            f'cannot be read as a safetensors file: {error}',
            _FETCH_AGAIN,
            error,
        )
    return {'state_dict': state_dict, 'meta': meta}


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], 'little')
    return path.suffix == '.safetensors' or (
        head[8:9] == b'{' and length + 8 <= path.stat().st_size
    )


def _read_file(path: Path, map_location: Any) -> dict:
    path = path.expanduser()
    if not path.is_file():
        where = '' if path.is_absolute() else f' in {Path.cwd()}'
        what = 'is a folder' if path.is_dir() else 'does not exist'
        _refuse(
            path,
            what + where,
            'Correct the path of the checkpoint file, or make it absolute',
        )
    with path.open('rb') as file:
        head = file.read(64)
    if not head:
        _refuse(path, 'is empty (0 bytes)', _FETCH_AGAIN)
    if _is_safetensors(path, head):
        return _read_safetensors(path, map_location)
    return _read_pickle(path, head, map_location)


# --------------------------------------------------------------------------
# Loaders, one for each kind of address. mmengine logs "Loads checkpoint by X
# backend", where X is the function's name without its first ten letters.
# --------------------------------------------------------------------------
def load_from_safe_local(filename: str, map_location: Any = None) -> dict:
    """Read a local file; see :func:`read_checkpoint`."""
    return _read_file(Path(filename), map_location)


def load_from_e3va_mm(filename: str, map_location: Any = None) -> dict:
    """Read ``e3va_mm://NAME``: a file that comes with this package."""
    name = filename[len('e3va_mm://') :]
    path = (ASSETS / name).resolve()
    if not path.is_relative_to(ASSETS):
        _refuse(
            filename,
            'points out of the files that come with e3va_mm',
            'Give the path of the file itself instead',
        )
    if not path.is_file():
        names = sorted(p.name for p in ASSETS.glob('*') if p.is_file())
        _refuse(
            filename,
            'is no file of e3va_mm',
            f'Available: {", ".join(names) or "none"}',
        )
    return _read_file(path, map_location)


def _fetch(url: str, cached: Path, map_location: Any) -> dict:
    """Download `url`, read it, and only then put it into the cache."""
    given = _HASH.search(cached.name)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=cached.parent, prefix='partial-'
        ) as folder:
            path = Path(folder, cached.name)
            print_log(f'Downloading {url} to {cached}', logger='current')
            torch.hub.download_url_to_file(
                url,
                str(path),
                hash_prefix=given and given[1],
                progress=os.isatty(2),
            )
            content = _read_file(path, map_location)
            path.replace(cached)
    except CheckpointError as error:
        text = str(error).replace(str(path), 'The file')
        raise CheckpointError(
            f'{url} was downloaded, but not kept. {text}'
        ) from error
    # urllib, http and ssl raise errors of many kinds; torch RuntimeError.
    except Exception as error:
        _refuse(
            url,
            f'cannot be downloaded: {error}',
            'Download it by hand and set `init_cfg.checkpoint` (or '
            f'`load_from`) to its path, or store it as {cached}',
            error,
        )
    return content


def load_from_safe_http(
    filename: str,
    map_location: Any = None,
    model_dir: str | None = None,
    progress: bool = True,
) -> dict:
    """Read a URL by way of torch hub's cache of checkpoints.

    In distributed runs the first process of each machine downloads while the
    others wait.

    Args:
        filename: The http or https URL.
        map_location: As for :func:`read_checkpoint`.
        model_dir: The cache. Defaults to ``checkpoints`` in the folder that
            ``torch.hub.get_dir()`` gives.
        progress: Accepted for compatibility with mmengine; the progress bar
            is shown where there is a terminal.

    Raises:
        CheckpointError: If the download fails, if the hash in the file's name
            does not fit, or if the file cannot be read safely. Such a file
            does not enter the cache.
    """
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    cached = Path(folder, os.path.basename(urlparse(filename).path))
    rank, world_size = get_dist_info()
    content = None
    try:
        first = world_size == 1 or int(os.environ.get('LOCAL_RANK', rank)) == 0
        if first and not cached.is_file():
            content = _fetch(filename, cached, map_location)
    finally:
        # Also after a failure, or the others would wait for ever.
        if world_size > 1:
            barrier()
    if content is not None:
        return content
    if not cached.is_file():
        _refuse(
            filename,
            "cannot be downloaded by this machine's first process",
            'See its message',
        )
    try:
        return _read_file(cached, map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} It is the stored copy of {filename}: delete it to '
            'download it again.'
        ) from error


def _look_up(filename: str, table: dict[str, str]) -> str:
    name = filename.split('://', 1)[1]
    if name not in table:
        _refuse(
            filename,
            f'is none of the {len(table)} models that mmengine knows there',
            'Give the URL or the path of the checkpoint file',
        )
    return table[name]


def load_from_safe_torchvision(
    filename: str, map_location: Any = None
) -> dict:
    """Read ``torchvision://NAME`` from the URL that torchvision gives."""
    url = _look_up(filename, mm_checkpoint.get_torchvision_models())
    return load_from_safe_http(url, map_location)


def load_from_safe_openmmlab(filename: str, map_location: Any = None) -> dict:
    """Read ``openmmlab://NAME`` from mmengine's table of models."""
    scheme, name = filename.split('://', 1)
    name = mm_checkpoint.get_deprecated_model_names().get(name, name)
    found = _look_up(f'{scheme}://{name}', mm_checkpoint.get_external_models())
    if found.startswith(('http://', 'https://')):
        return load_from_safe_http(found, map_location)
    home = mm_checkpoint._get_mmengine_home()
    return _read_file(Path(home, found), map_location)


def load_from_safe_mmcls(filename: str, map_location: Any = None) -> dict:
    """Read the backbone of ``mmcls://NAME`` from mmengine's table."""
    url = _look_up(filename, mm_checkpoint.get_mmcls_models())
    content = load_from_safe_http(url, map_location)
    return mm_checkpoint._process_mmcls_checkpoint(content)


def load_from_safe_ceph(
    filename: str, map_location: Any = None, backend: str = 'petrel'
) -> dict:
    """Read an object of a store that mmengine has a file backend for."""
    store = get_file_backend(filename, backend_args={'backend': backend})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, os.path.basename(filename))
        path.write_bytes(store.get(filename))
        return _read_file(path, map_location)


def load_from_safe_pavi(filename: str, map_location: Any = None) -> NoReturn:
    """Refuse ``pavi://``, whose client unpickles by itself."""
    _refuse(
        filename,
        'is an address of the pavi model cloud, which is not read',
        'Download the checkpoint by hand and give its path',
    )


# Regular expressions, as mmengine understands them; the empty one is last.
_LOADERS = {
    'e3va_mm://': load_from_e3va_mm,
    'http://': load_from_safe_http,
    'https://': load_from_safe_http,
    'torchvision://': load_from_safe_torchvision,
    'modelzoo://': load_from_safe_torchvision,
    'openmmlab://': load_from_safe_openmmlab,
    'open-mmlab://': load_from_safe_openmmlab,
    'mmcls://': load_from_safe_mmcls,
    r'(\S+\:)?s3://': load_from_safe_ceph,
    r'(\S+\:)?petrel://': load_from_safe_ceph,
    'pavi://': load_from_safe_pavi,
    '': load_from_safe_local,
}


def read_checkpoint(
    path_or_url: str | os.PathLike, map_location: Any = 'cpu'
) -> dict:
    """Read a checkpoint without running anything that it may contain.

    ``.pth`` files (any file of ``torch.save``) are read with
    ``weights_only=True`` under an explicit list of allowed names, enough for
    the training checkpoints of mmengine. Before torch 2.6 there is no such
    list: there only ``weights_only=True`` holds, and a training checkpoint
    that carries a message hub is refused.

    The records of a zip-format ``.pth`` are compared with their checksums; a
    file saved after ``torch.serialization.set_crc32_options(False)`` is
    therefore refused as damaged. The old format and safetensors carry none,
    so a flipped bit within the numbers of such a file goes unnoticed.

    Args:
        path_or_url: A local path (``~`` is expanded), an http(s) URL,
            ``e3va_mm://NAME`` for a file that comes with this package, or any
            other scheme of mmengine's ``CheckpointLoader``.
        map_location: As for ``torch.load``. For safetensors a device or its
            name; anything else means the CPU. Defaults to ``'cpu'``.

    Returns:
        What the file holds. A safetensors file gives
        ``dict(state_dict=..., meta=...)`` with its metadata as ``meta``.

    Raises:
        CheckpointError: If the file is missing, incomplete, damaged, not a
            checkpoint, or names anything that could run code.
    """
    source = os.fspath(path_or_url)
    loader = next(
        loader
        for prefix, loader in _LOADERS.items()
        if re.match(prefix, source)
    )
    return loader(source, map_location)


def register_safe_loaders() -> None:
    """Make mmengine read every checkpoint through :func:`read_checkpoint`.

    Called when ``e3va_mm.checkpoint`` is imported; more calls change nothing.
    """
    for prefix, loader in _LOADERS.items():
        mm_checkpoint.CheckpointLoader.register_scheme(
            prefix, loader, force=True
        )
