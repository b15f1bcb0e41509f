"""Adapter files: all of a model but its frozen trunks, megabytes in all.

A safetensors file, with no pickle on the way. Its metadata tell where the
trunk's weights are read from, and how they are recognised.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

from e3va_mm.errors import CheckpointError
from e3va_mm.utils.files import write_whole
from e3va_mm.version import __version__
from e3va_mm.weights.fingerprint import checksum
from e3va_mm.weights.state_dicts import part_of

FORMAT = '1'
# All metadata of ours begin so: no single damaged byte hides what a file is.
_MARK = 'e3va_mm.'
# Below the prefix of a backbone, in the state dict that a file is read as.
RECORD = 'side_path.trunk_record'


@dataclass(frozen=True)
class TrunkRecord:
    """Which trunk an adapter file was trained on.

    Attributes:
        source: Path or URL that its weights are read from; None for a stock
            class that brings them itself.
        fingerprint: That of its weights, see :func:`.fingerprint`.
        sha256: Of the source, where that is a local file.
        file: The adapter file that says so; empty while it is not read.
        part: What the file holds, ``'model'`` or ``'backbone'``.
    """

    source: str | None
    fingerprint: str
    sha256: str | None = None
    file: str = ''
    part: str = 'model'

    def to_tensor(self) -> Tensor:
        """As a tensor, which every loader of state dicts passes on."""
        text = json.dumps(asdict(self)).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, value: Tensor) -> 'TrunkRecord':
        """The inverse of :meth:`to_tensor`.

        Raises:
            CheckpointError: If anything else is in its place.
        """
        try:
            return cls(**json.loads(value.cpu().numpy().tobytes()))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'Expected the record of a trunk in {RECORD}, but got {error}.'
                ' Take the adapter file as it was written.'
            ) from error


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        tensors: The state dict without the trunks.
        trunks: What the trunks were, by the prefix of their backbone.
        trainable: Names of the parameters that trained.
        config: The text of the config.
        dataset_meta: Class names and what else the data set says.
        part: ``'model'``, or ``'backbone'`` without neck and heads.
        version: The version of e3va_mm that wrote it.
    """

    tensors: dict[str, Tensor]
    trunks: dict[str, TrunkRecord]
    trainable: tuple[str, ...]
    config: str = ''
    dataset_meta: Mapping[str, Any] | None = None
    part: str = 'model'
    version: str = __version__

    def write(self, path: str | os.PathLike) -> int:
        """Write it whole or not at all; an older file stays until then.

        Args:
            path: The file. Its folder is made.

        Returns:
            int: Its size in bytes.

        Raises:
            CheckpointError: If it cannot be written.
        """
        tensors = {
            # Parameters that share memory are two tensors in the file.
            key: value.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            for key, value in self.tensors.items()
        }
        kept = ('source', 'fingerprint', 'sha256')
        trunks = {
            prefix: {name: getattr(record, name) for name in kept}
            for prefix, record in self.trunks.items()
        }
        texts = dict(
            format=FORMAT,
            version=self.version,
            part=self.part,
            config=self.config,
            dataset_meta=json.dumps(_jsonable(self.dataset_meta or {})),
            trainable=json.dumps(self.trainable),
            trunks=json.dumps(trunks),
        )
        metadata = {_MARK + key: text for key, text in texts.items()}
        metadata[_MARK + 'sha256'] = checksum(tensors, metadata)
        content = save(tensors, {'format': 'pt', **metadata})
        write_whole(Path(path), content)
        return len(content)

    @classmethod
    def parse(
        cls, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> 'AdapterFile | None':
        """What was read of a safetensors file; None if it is another kind.

        Args:
            path: The file, for messages.
            tensors: Its tensors.
            metadata: Its metadata.

        Raises:
            CheckpointError: If it is damaged or of another version.
        """
        marked = {k: v for k, v in metadata.items() if k.startswith(_MARK)}
        if not marked:
            return None
        expected = marked.pop(_MARK + 'sha256', None)
        if checksum(tensors, marked) != expected:
            raise CheckpointError(
                f'{path} is damaged: the checksum of the adapter file is '
                'wrong. Fetch or copy the file again and compare its size '
                'with the original.'
            )
        texts = part_of(marked, _MARK)
        if texts.get('format') != FORMAT:
            raise CheckpointError(
                f'{path} is an adapter file of the format '
                f'{texts.get("format")}, but e3va_mm {__version__} reads '
                f'{FORMAT}. Use the version that wrote it '
                f'({texts.get("version")}) or a later one.'
            )
        try:
            return cls._of_texts(tensors, texts)
        # Anything may stand in a file that was made by hand.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'{path} has metadata that no adapter file has '
                f'({type(error).__name__}: {error}). Write it again with '
                'tools/adapter.py.'
            ) from error

    @classmethod
    def _of_texts(
        cls, tensors: dict[str, Tensor], texts: dict[str, str]
    ) -> 'AdapterFile':
        meta = json.loads(texts['dataset_meta'])
        # What the frameworks' data sets have as tuples.
        if isinstance(meta.get('classes'), list):
            meta['classes'] = tuple(meta['classes'])
        if isinstance(meta.get('palette'), list):
            meta['palette'] = [tuple(color) for color in meta['palette']]
        trunks = json.loads(texts['trunks'])
        for record in trunks.values():
            for name in ('source', 'fingerprint', 'sha256'):
                if not isinstance(record[name] or '', str):
                    raise TypeError(f'{name} is {record[name]!r}')
        return cls(
            tensors=tensors,
            trunks={p: TrunkRecord(**each) for p, each in trunks.items()},
            trainable=tuple(json.loads(texts['trainable'])),
            config=texts['config'],
            dataset_meta=meta,
            part=texts['part'],
            version=texts['version'],
        )

    def checkpoint(self, path: Path) -> dict:
        """As a checkpoint of mmengine, for every loader.

        Args:
            path: The file that it was read from.

        Returns:
            dict: ``state_dict``, with a record for each trunk, and ``meta``.
        """
        records = {
            prefix + RECORD: replace(
                record, file=str(path), part=self.part
            ).to_tensor()
            for prefix, record in self.trunks.items()
        }
        meta = _Meta(e3va_mm_version=self.version, cfg=self.config)
        meta.path = str(path)
        if self.dataset_meta:
            meta['dataset_meta'] = self.dataset_meta
        return dict(state_dict={**self.tensors, **records}, meta=meta)

    def without_heads(self) -> 'AdapterFile':
        """The backbones' part alone."""
        prefixes = tuple(self.trunks)
        return replace(
            self,
            tensors={
                key: value
                for key, value in self.tensors.items()
                if key.startswith(prefixes)
            },
            trainable=tuple(
                name for name in self.trainable if name.startswith(prefixes)
            ),
            part='backbone',
        )

    def of_task(self, name: str, config: str = '') -> 'AdapterFile':
        """The part of one of several tasks that trained together.

        Args:
            name: The task, of a ``MultiTaskModel``.
            config: The text of its own config.

        Raises:
            CheckpointError: If there is no such task.
        """
        prefix = f'tasks.{name}.'
        tensors = part_of(self.tensors, prefix)
        if not tensors:
            tasks = {
                key.split('.')[1]
                for key in self.tensors
                if key.startswith('tasks.')
            }
            raise CheckpointError(
                f'Expected a task, one of {sorted(tasks)}, but got {name!r}. '
                'Only adapter files of a MultiTaskModel have tasks.'
            )
        return replace(
            self,
            tensors=tensors,
            trunks=part_of(self.trunks, prefix),
            trainable=tuple(part_of(dict.fromkeys(self.trainable), prefix)),
            config=config,
            dataset_meta=(self.dataset_meta or {}).get(name),
        )


class _Meta(dict):
    """The ``meta`` of an adapter file: what resumes asks for its epoch."""

    path = ''

    def __missing__(self, key: str) -> NoReturn:
        if key in ('epoch', 'iter'):
            raise CheckpointError(
                f'{self.path} is an adapter file, which does not hold the '
                'state of a run and of its optimizer that a resume needs. '
                'Resume from a full checkpoint (`epoch_N.pth` or '
                '`iter_N.pth`), or start anew from these weights: '
                f'`resume=False`, `load_from={self.path!r}`.'
            )
        raise KeyError(key)


def _jsonable(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON gives back as it was, but for tuples and arrays."""

    def default(value: Any) -> Any:
        return value.tolist() if hasattr(value, 'tolist') else str(value)

    def kept(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: kept(each)
            for key, each in value.items()
            if not isinstance(each, Mapping)
            or all(isinstance(name, str) for name in each)
        }

    return json.loads(json.dumps(kept(meta), default=default))
