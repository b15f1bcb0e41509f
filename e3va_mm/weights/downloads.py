"""Read a checkpoint from a URL by way of torch hub's cache."""

import os
import re
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import print_log

from e3va_mm.errors import CheckpointError
from e3va_mm.weights.file_formats import read_file

# The convention of PyTorch and OpenMMLab: the first digits of the SHA-256 at
# the end of the name. Eight digits that read as a date are not a hash.
_HASH = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')


def read_url(url: str, map_location: Any) -> dict:
    """Download a file once and read it.

    In distributed runs the first process of each machine downloads while the
    others wait.

    Args:
        url: The http or https URL.
        map_location: As for :func:`.file_formats.read_file`.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: If the download fails, if the hash in the file's name
            does not fit, or if the file cannot be read safely. Such a file
            does not enter the cache.
    """
    rank, world_size = get_dist_info()
    first = world_size == 1 or int(os.environ.get('LOCAL_RANK', rank)) == 0
    try:
        if first and not (cached := _cached(url)).is_file():
            return _fetch(url, cached, map_location)
    finally:
        # Also after a failure, or the others would wait for ever.
        barrier()
    cached = _cached(url)
    if not cached.is_file():
        raise CheckpointError(
            f"{url} cannot be downloaded by this machine's first process. "
            'See its message.'
        )
    try:
        return read_file(cached, map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} It is the stored copy of {url}: delete it to download '
            'it again.'
        ) from None


def _cached(url: str) -> Path:
    """Where a file is stored: under its name, as torch hub stores it.

    Many have the same name (``model.safetensors``). A note says from where
    one was downloaded here; from elsewhere it has a digest of its URL in the
    name.
    """
    name = os.path.basename(urlparse(url).path)
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    note = _note(path)
    if _HASH.search(name) or not note.is_file() or note.read_text() == url:
        return path
    return path.with_name(f'{sha256(url.encode()).hexdigest()[:12]}-{name}')


def _note(cached: Path) -> Path:
    return Path(torch.hub.get_dir(), 'e3va_mm', f'{cached.name}.url')


def _fetch(url: str, cached: Path, map_location: Any) -> dict:
    """Download `url`, read it, and only then put it into the cache."""
    digits = _HASH.search(cached.name)
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
                hash_prefix=digits and digits[1],
                progress=os.isatty(2),
            )
            content = read_file(path, map_location)
            _note(cached).parent.mkdir(exist_ok=True)
            _note(cached).write_text(url)
            path.replace(cached)
    except CheckpointError as error:
        text = str(error).replace(str(path), 'The file')
        raise CheckpointError(
            f'{url} was downloaded, but not kept. {text}'
        ) from None
    # urllib, http and ssl raise errors of many kinds; torch RuntimeError.
    except Exception as error:
        raise CheckpointError(
            f'{url} cannot be downloaded: {error}. Download it by hand and '
            'set `init_cfg.checkpoint` (or `load_from`) to its path, or store '
            f'it as {cached}.'
        ) from error
    return content
