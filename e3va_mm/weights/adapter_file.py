"""Adapter files: all of a model but its frozen trunks, megabytes in all.

A safetensors file, with no pickle on the way. Its metadata tell where the
trunk's weights are read from, and how they are recognised.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from safetensors.torch import save
from torch import Tensor, nn

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils.files import file_sha256, write_whole
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.version import __version__
from e3va_mm.weights.matching import match_state
from e3va_mm.weights.unwrapping import part_of

FORMAT = '1'
# All metadata of ours begin so: no single damaged byte hides what a file is.
_MARK = 'e3va_mm.'
# Below the prefix of a backbone, in the state dict that a file is read as.
RECORD = 'side_path.trunk_record'
# What a trunk's ``trunk_source`` says of a file that it does not know.
CHECKPOINT = 'the checkpoint'


@dataclass(frozen=True)
class TrunkRecord:
    """Which trunk an adapter file was trained on.

    Attributes:
        source: Path or URL that its weights are read from; None for a stock
            class that brings them itself.
        fingerprint: That of its weights, see :func:`fingerprint`.
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
                f'Expected the record of a trunk in {RECORD}, but it cannot '
                f'be read: {error}. Take the adapter file as it was written.'
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
        metadata = {_MARK + key: text for key, text in self._texts().items()}
        metadata[_MARK + 'sha256'] = _checksum(tensors, metadata)
        content = save(tensors, {'format': 'pt', **metadata})
        write_whole(Path(path), content)
        return len(content)

    def _texts(self) -> dict[str, str]:
        trunks = {
            prefix: dict(
                source=record.source,
                fingerprint=record.fingerprint,
                sha256=record.sha256,
            )
            for prefix, record in self.trunks.items()
        }
        return dict(
            format=FORMAT,
            version=self.version,
            part=self.part,
            config=self.config,
            dataset_meta=json.dumps(_plain(self.dataset_meta or {})),
            trainable=json.dumps(self.trainable),
            trunks=json.dumps(trunks),
        )

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
        if _checksum(tensors, marked) != expected:
            raise CheckpointError(
                f'{path} is damaged: the checksum of the adapter file is '
                'wrong. Fetch or copy the file again and compare its size '
                'with the original.'
            )
        texts = {k.removeprefix(_MARK): v for k, v in marked.items()}
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
        return cls(
            tensors=tensors,
            trunks={
                prefix: TrunkRecord(
                    source=_text(record['source'], True),
                    fingerprint=_text(record['fingerprint']),
                    sha256=_text(record['sha256'], True),
                )
                for prefix, record in json.loads(texts['trunks']).items()
            },
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
        meta = _AdapterMeta(
            str(path), e3va_mm_version=self.version, cfg=self.config
        )
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


class _AdapterMeta(dict):
    """The ``meta`` of an adapter file: what resumes asks for its epoch."""

    def __init__(self, path: str, **meta: Any) -> None:
        super().__init__(meta)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        if key in ('epoch', 'iter'):
            raise CheckpointError(
                f'{self._path} is an adapter file, which does not hold the '
                'state of a run and of its optimizer that a resume needs. '
                'Resume from a full checkpoint (`epoch_N.pth` or '
                '`iter_N.pth`), or start anew from these weights: '
                f'`resume=False`, `load_from={self._path!r}`.'
            )
        raise KeyError(key)


def adapter_of(
    model: nn.Module,
    trunks: Mapping[str, TrunkRecord],
    state: Mapping[str, Tensor] | None = None,
    config: str = '',
    dataset_meta: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """The adapter file of a model.

    Args:
        model (nn.Module): The model.
        trunks (Mapping[str, TrunkRecord]): Those of :func:`trunk_records`.
        state (Mapping[str, Tensor], optional): Its state dict, where that is
            not the one to save, as with EMA.
        config (str): The text of its config.
        dataset_meta (Mapping, optional): The data set's, with class names.

    Returns:
        AdapterFile: What :meth:`AdapterFile.write` writes.
    """
    return AdapterFile(
        tensors=without_trunks(
            model, model.state_dict() if state is None else state
        ),
        trunks=dict(trunks),
        trainable=tuple(
            name
            for name, value in model.named_parameters()
            if value.requires_grad
        ),
        config=config,
        dataset_meta=dataset_meta,
    )


def trunk_records(
    model: nn.Module,
    sources: Mapping[str, str | None] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, TrunkRecord]:
    """What the trunks of a model are, and where they come from.

    Args:
        model (nn.Module): The model, its trunks with their weights.
        sources (Mapping[str, str], optional): Paths or URLs by the prefix of
            the backbone, for trunks that do not know theirs.
        state (Mapping[str, Tensor], optional): Its state dict, where it is
            sharded over processes.

    Raises:
        ConfigError: If no backbone has a side path, or if the weights of a
            trunk cannot be read again.
    """
    records = {}
    for prefix, backbone in tuned_backbones(model):
        source = backbone.trunk_address or (sources or {}).get(prefix)
        if source is None and backbone.trunk_source in (
            None,
            CHECKPOINT,
        ):
            raise ConfigError(
                'Expected a path or URL that the weights of the trunk under '
                f'{prefix!r} are read from, for the adapter file does not '
                f'hold them, but they are {_origin(backbone)}. Set '
                "`model.backbone.init_cfg=dict(type='Pretrained', "
                'checkpoint=...)` to the file with exactly these weights.'
            )
        trunk = (
            backbone.trunk_state()
            if state is None
            else backbone.trunk_part(part_of(state, prefix))
        )
        records[prefix] = TrunkRecord(
            source=source,
            fingerprint=fingerprint(trunk),
            sha256=file_sha256(source),
        )
    if not records:
        raise ConfigError(
            'An adapter file is what trains beside a frozen trunk, but no '
            f'backbone of this {type(model).__name__} has a side path. Set '
            "`model.backbone.type='e3va_mm.E3VASwinTransformer'`, or use "
            'the CheckpointHook.'
        )
    return records


def _origin(backbone: nn.Module) -> str:
    return 'random' if backbone.trunk_source is None else 'of a checkpoint'


def without_trunks(
    model: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What of a model's state is not a frozen trunk's."""
    trunks = set()
    for prefix, backbone in tuned_backbones(model):
        own = part_of(state, prefix)
        trunks |= {prefix + key for key in backbone.trunk_part(own)}
    return {key: value for key, value in state.items() if key not in trunks}


def check_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse an adapter file that does not fit the whole of a model.

    mmengine's loader only logs what is missing in neck and heads, or too
    much. A state dict of another origin passes.

    Args:
        model (nn.Module): The model that is about to load it.
        state (Mapping[str, Tensor]): The state dict as it was read.

    Raises:
        CheckpointError: If a tensor is missing, has another shape, or is
            left over.
    """
    records = {
        key.removesuffix(RECORD): TrunkRecord.from_tensor(value)
        for key, value in state.items()
        if key.endswith(RECORD)
    }
    if not records:
        return
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    record = next(iter(records.values()))
    expected = without_trunks(model, model.state_dict())
    if record.part == 'backbone':
        expected = {
            key: value
            for key, value in expected.items()
            if key.startswith(tuple(records))
        }
    report = match_state(
        expected,
        {key: v for key, v in state.items() if not key.endswith(RECORD)},
        what=f'{type(model).__name__} without its trunk',
        source=record.file,
        hint='Take the config that the adapter file was trained with '
        '(`tools/adapter.py inspect FILE --config`).',
    )
    print_log(str(report), logger='current')


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, however these are stored.

    Args:
        tensors (Mapping[str, Tensor]): The weights; floating-point values
            count in single precision.
    """
    digest = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        wide = torch.float32 if value.is_floating_point() else torch.int64
        _add(digest, name, value.to(wide))
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = sha256(json.dumps(sorted(texts.items())).encode())
    for name in sorted(tensors):
        _add(digest, f'{name} {tensors[name].dtype}', tensors[name].cpu())
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f'{name} {tuple(value.shape)}\n'.encode())
    digest.update(value.contiguous().flatten().view(torch.uint8).numpy())


def _text(value: Any, optional: bool = False) -> str | None:
    if isinstance(value, str) or (optional and value is None):
        return value
    raise TypeError(f'expected a text, but got {value!r}')


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON gives back as it was, but for tuples and arrays."""

    def default(value: Any) -> Any:
        return value.tolist() if hasattr(value, 'tolist') else str(value)

    kept = {
        key: value
        for key, value in meta.items()
        if not isinstance(value, Mapping)
        or all(isinstance(name, str) for name in value)
    }
    return json.loads(json.dumps(kept, default=default))
