"""The only door for checkpoints: one loader for each kind of address.

:func:`register_safe_loaders` puts the door in front of every checkpoint path
of mmengine, so ``init_cfg``, ``load_from``, ``resume`` and the frameworks'
inference functions use it too.
"""

import os
import re
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from mmengine.fileio import get_file_backend
from mmengine.runner import checkpoint as mm_checkpoint
from torch import nn

from e3va_mm.errors import CheckpointError
from e3va_mm.weights.adapter_file import RECORD, check_adapter
from e3va_mm.weights.downloads import read_url
from e3va_mm.weights.reading import read_file

ASSETS = Path(__file__).resolve().parents[1] / 'assets'


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
        ``dict(state_dict=..., meta=...)`` with its metadata as ``meta``, an
        adapter file the same as a checkpoint of mmengine.

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
    """Make mmengine read every checkpoint as :func:`read_checkpoint` does.

    Its loader of state dicts refuses adapter files that do not fit, too.
    Called when ``e3va_mm.checkpoint`` is imported; more calls change nothing.
    """
    for prefix, loader in _LOADERS.items():
        mm_checkpoint.CheckpointLoader.register_scheme(
            prefix, loader, force=True
        )
    mm_checkpoint.load_state_dict = load_state_dict


# All loaders of mmengine end here, by its name in their module.
_load_state_dict = mm_checkpoint.load_state_dict


@wraps(_load_state_dict)
def load_state_dict(
    module: nn.Module, state_dict: dict, *args: Any, **kwargs: Any
) -> None:
    """mmengine's, after :func:`.adapter_file.check_adapter`."""
    check_adapter(module, state_dict)
    _load_state_dict(module, state_dict, *args, **kwargs)


# mmengine logs "Loads checkpoint by X backend", where X is the name of one of
# the following functions without its first ten letters.
def load_from_safe_local(filename: str, map_location: Any = None) -> dict:
    """Read a local file; see :func:`read_checkpoint`."""
    checkpoint = read_file(Path(filename), map_location)
    state = checkpoint.get('state_dict')
    if isinstance(state, dict) and any(key.endswith(RECORD) for key in state):
        checkpoint['meta'] = _AdapterMeta(checkpoint['meta'], filename)
    return checkpoint


class _AdapterMeta(dict):
    """The ``meta`` of an adapter file: what resumes asks for its epoch."""

    def __init__(self, meta: dict, filename: str) -> None:
        super().__init__(meta)
        self.filename = filename

    def __missing__(self, key: str) -> NoReturn:
        if key in ('epoch', 'iter'):
            raise CheckpointError(
                f'{self.filename} is an adapter file, which does not hold the '
                'state of a run and of its optimizer that a resume needs. '
                'Resume from a full checkpoint (`epoch_N.pth` or '
                '`iter_N.pth`), or start anew from these weights: '
                f'`resume=False`, `load_from={self.filename!r}`.'
            )
        raise KeyError(key)


def load_from_e3va_mm(filename: str, map_location: Any = None) -> dict:
    """Read ``e3va_mm://NAME``: a file that comes with this package."""
    path = (ASSETS / filename.removeprefix('e3va_mm://')).resolve()
    if not path.is_relative_to(ASSETS):
        raise CheckpointError(
            f'{filename} points out of the files that come with e3va_mm. '
            'Give the path of the file itself instead.'
        )
    if not path.is_file():
        names = sorted(p.name for p in ASSETS.glob('*') if p.is_file())
        raise CheckpointError(
            f'{filename} is no file of e3va_mm. Available: '
            f'{", ".join(names) or "none"}.'
        )
    return read_file(path, map_location)


def load_from_safe_http(
    filename: str,
    map_location: Any = None,
    model_dir: str | None = None,
    progress: bool = True,
) -> dict:
    """Read a URL; see :func:`.downloads.read_url`.

    Args:
        filename: The http or https URL.
        map_location: As for :func:`read_checkpoint`.
        model_dir: The cache. Defaults to that of torch hub.
        progress: Accepted for compatibility with mmengine; the progress bar
            is shown where there is a terminal.
    """
    return read_url(filename, map_location, model_dir)


def load_from_safe_torchvision(
    filename: str, map_location: Any = None
) -> dict:
    """Read ``torchvision://NAME`` from the URL that torchvision gives."""
    url = _look_up(filename, mm_checkpoint.get_torchvision_models())
    return read_url(url, map_location)


def load_from_safe_openmmlab(filename: str, map_location: Any = None) -> dict:
    """Read ``openmmlab://NAME`` from mmengine's table of models."""
    scheme, name = filename.split('://', 1)
    name = mm_checkpoint.get_deprecated_model_names().get(name, name)
    found = _look_up(f'{scheme}://{name}', mm_checkpoint.get_external_models())
    if found.startswith(('http://', 'https://')):
        return read_url(found, map_location)
    home = mm_checkpoint._get_mmengine_home()
    return read_file(Path(home, found), map_location)


def load_from_safe_mmcls(filename: str, map_location: Any = None) -> dict:
    """Read the backbone of ``mmcls://NAME`` from mmengine's table."""
    url = _look_up(filename, mm_checkpoint.get_mmcls_models())
    content = read_url(url, map_location)
    return mm_checkpoint._process_mmcls_checkpoint(content)


def load_from_safe_ceph(
    filename: str, map_location: Any = None, backend: str = 'petrel'
) -> dict:
    """Read an object of a store that mmengine has a file backend for."""
    store = get_file_backend(filename, backend_args={'backend': backend})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, os.path.basename(filename))
        path.write_bytes(store.get(filename))
        return read_file(path, map_location)


def load_from_safe_pavi(filename: str, map_location: Any = None) -> NoReturn:
    """Refuse ``pavi://``, whose client unpickles by itself."""
    raise CheckpointError(
        f'{filename} is an address of the pavi model cloud, which is not '
        'read. Download the checkpoint by hand and give its path.'
    )


def _look_up(filename: str, table: dict[str, str]) -> str:
    name = filename.split('://', 1)[1]
    if name not in table:
        raise CheckpointError(
            f'{filename} is none of the {len(table)} models that mmengine '
            'knows there. Give the URL or the path of the checkpoint file.'
        )
    return table[name]


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
