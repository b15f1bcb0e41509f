"""Weights of Hugging Face: folders with shards, and ``hf://`` addresses."""

import json
import re
from pathlib import Path
from typing import Any

from e3va_mm.errors import CheckpointError
from e3va_mm.weights.file_formats import read_file

# What an adapter file of ours, and a model's weights, are called there, in
# the order of preference.
ADAPTER = 'adapter.safetensors'
_NAMES = (ADAPTER, 'model.safetensors', 'pytorch_model.bin')
_INDEX = '.index.json'
_ADDRESS = re.compile(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?')


def read_folder(folder: Path, map_location: Any) -> dict:
    """Read the weights in a folder that ``save_pretrained`` wrote.

    Args:
        folder: With ``model.safetensors`` or ``pytorch_model.bin``, or with
            the index of either and its shards.
        map_location: As for :func:`.file_formats.read_file`.

    Raises:
        CheckpointError: If there are none, or a shard cannot be read.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return read_file(folder / name, map_location)
        if (folder / (name + _INDEX)).is_file():
            state: dict = {}
            for shard in _shards(folder / (name + _INDEX)):
                content = read_file(folder / shard, map_location)
                state |= content.get('state_dict', content)
            return dict(state_dict=state)
    raise CheckpointError(
        f'{folder} is a folder without weights: expected {_NAMES[1]}, '
        f'{_NAMES[2]} or the index of one in it. Give the path of the file '
        'itself.'
    )


def read_hub(address: str, map_location: Any) -> dict:
    """Read the weights of a repository of Hugging Face, or a file there.

    They come through the cache of huggingface_hub, whose environment
    variables (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``)
    apply.

    Args:
        address: ``hf://ORG/NAME[@REVISION][/FILE]``.
        map_location: As for :func:`.file_formats.read_file`.

    Raises:
        CheckpointError: If huggingface_hub is missing, or the file is not
            there and cannot be fetched.
    """
    path = fetch(address)
    read = read_folder if path.is_dir() else read_file
    return read(path, map_location)


def fetch(address: str) -> Path:
    """The file of an ``hf://`` address, or the folder with its weights.

    Args:
        address: ``hf://ORG/NAME[@REVISION][/FILE]``.

    Raises:
        CheckpointError: See :func:`read_hub`.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(
            'An address of Hugging Face should be '
            f'hf://ORG/NAME[@REVISION][/FILE], but is {address}.'
        )
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise CheckpointError(
            f'{address} needs huggingface_hub, which is not installed: `pip '
            'install huggingface_hub`. Or give the path of a file.'
        ) from None
    name, revision, file = match.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(name, file, revision=revision))
        for kind in _NAMES:
            wanted = [kind, kind + _INDEX, kind.replace('.', '-*-of-*.')]
            folder = snapshot_download(
                name, revision=revision, allow_patterns=wanted
            )
            if any(Path(folder, each).is_file() for each in wanted[:2]):
                break
        return Path(folder)
    # No connection, no such repository or file, no permission, a bad name.
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise CheckpointError(
            f'{address} cannot be fetched, and is not in the cache of '
            f'huggingface_hub ({type(error).__name__}: {reason}). Check the '
            'name and the connection, log in with `hf auth login` where the '
            'repository asks for it, or download the file by hand and give '
            'its path.'
        ) from error


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = json.loads(index.read_text())['weight_map'].values()
        return sorted({Path(name).name for name in names})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'{index} is no index of shards ({type(error).__name__}: {error}).'
            ' Fetch it again.'
        ) from error
