"""What a frozen trunk gave for an image, kept on disk for later epochs.

The key of an entry is a digest of the very pixels that reach the trunk, with
their padding, so that whatever shapes them, from the file to the data
preprocessor, is part of it. Weights and options of the trunk, the taps that
are read, the form of the entries and the config of the data name the folder.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from mmengine.logging import print_log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.numerics.autocast import autocast_dtype
from e3va_mm.trunks import StageEnd, Trunk
from e3va_mm.trunks.stages import OnEnd, OnTap
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.utils.files import write_whole
from e3va_mm.utils.options import Check, Options, one_of, option, whole
from e3va_mm.utils.sizes import GIB

# Bytes of a disk that are left to others.
RESERVE = GIB
CODECS = {name: codec for name, codec in TAP_CODECS.items() if codec}
a_folder = Check(lambda value: isinstance(value, str) and value, 'a folder')


@dataclass(frozen=True, kw_only=True)
class TrunkCacheOptions(Options):
    """Options of ``trunk_cache``.

    Attributes:
        dir (str): The folder. Runs may share it.
        views (int): Random views of an image that are kept and used in turn.
            Defaults to 1.
        dtype (str): How an activation is kept: ``'exact'``, ``'bf16'``,
            standardised as ``'int8'`` with one scale a token or as ``'int4'``
            with one for 128 channels. Defaults to ``'bf16'``.

    Raises:
        ConfigError: If an option is out of range.
    """

    PREFIX: ClassVar[str] = 'backbone.trunk_cache.'

    dir: str = option(check=a_folder)
    views: int = option(1, whole())
    dtype: str = option('bf16', one_of(*CODECS))


class Event(NamedTuple):
    """A tap, or the end of a stage (``tap`` is None, ``size`` its grid)."""

    stage: int
    block: int
    tap: str | None
    size: tuple[int, int] | None
    dtype: str


class Entry(NamedTuple):
    """What a pass gave for one image, as it is kept."""

    events: list[Event]
    tensors: list[list[Tensor]]  # of each event

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.nbytes for tensors in self.tensors for t in tensors)


class TrunkCache:
    """Runs a trunk on new images, and reads what it gave for known ones.

    Closed, until a :class:`~e3va_mm.engine.hooks.TrunkCacheHook` has checked
    that there is room, and in evaluation the trunk runs as without it.

    Args:
        **options: See :class:`TrunkCacheOptions`.
    """

    def __init__(self, **options) -> None:
        self.options = TrunkCacheOptions.of(options)
        self._codec = CODECS[self.options.dtype]
        self.folder: Path | None = None
        self._left = 0
        self._warned = False

    def open(self, folder: Path, entries: int) -> None:
        """Read and write entries from now on.

        Args:
            folder (Path): Where they are.
            entries (int): How many there may be; more mean that the pixels of
                a view change.
        """
        self.folder = folder
        self._left = entries - self.count(folder)

    @property
    def is_open(self) -> bool:
        """Whether it is open; a training in which it is not should know."""
        if self.folder is None and not self._warned:
            self._warned = True
            print_log(
                'trunk_cache is closed: the trunk runs as without it. Add '
                "dict(type='e3va_mm.TrunkCacheHook') to custom_hooks.",
                'current',
                logging.WARNING,
            )
        return self.folder is not None

    @staticmethod
    def count(folder: Path) -> int:
        """The number of entries in a folder."""
        return sum(1 for _ in folder.glob('*/*.safetensors'))

    # -- a pass -------------------------------------------------------------

    def run(
        self,
        trunk: Trunk,
        image: Tensor,
        last: int,
        taps: Sequence[str],
        on_tap: OnTap,
        on_end: OnEnd | None = None,
    ) -> None:
        """As :meth:`Trunk.run`, and with the same arguments."""
        keys = self._keys(trunk, image, taps)
        entries = [self._read(key) for key in keys]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        # Backward asks for the first stages alone: no entry.
        part = last < len(trunk.blocks) - 1
        if missing and (part or self._left <= 0):
            trunk.run(image, last, taps, on_tap, on_end)
            return
        if missing:
            made = self.record(trunk, image[missing], taps)
            for i, entry in zip(missing, made, strict=True):
                entries[i] = entry
                if self._left > 0:
                    self._write(keys[i], entry)
        self.replay(entries, image.device, last, on_tap, on_end)

    def record(
        self, trunk: Trunk, image: Tensor, taps: Sequence[str]
    ) -> list[Entry]:
        """Run a trunk: what it gives, for each image of a batch."""
        made = [Entry([], []) for _ in image]

        def add(event: Event, values: Tensor) -> None:
            for entry, value in zip(made, values, strict=True):
                kept = self._codec.encode(value.contiguous())
                entry.events.append(event)
                entry.tensors.append([k.to('cpu', copy=True) for k in kept])

        def on_tap(stage: int, block: int, tap: str, value: Tensor) -> None:
            add(Event(stage, block, tap, None, _name(value.dtype)), value)

        def on_end(stage: int, end: StageEnd) -> None:
            dtype = _name(end.tokens.dtype)
            add(Event(stage, 0, None, tuple(end.size), dtype), end.tokens)

        trunk.run(image, len(trunk.blocks) - 1, taps, on_tap, on_end)
        return made

    def replay(
        self,
        entries: Sequence[Entry],
        device: torch.device,
        last: int,
        on_tap: OnTap,
        on_end: OnEnd | None = None,
    ) -> None:
        """Hand out what is kept, in the order of the pass.

        Args:
            entries (Sequence[Entry]): One for each image of the batch.
            device (torch.device): Where taps are wanted.
            last (int): The last stage that is wanted.
            on_tap (Callable): See :meth:`Trunk.run`.
            on_end (Callable, optional): See :meth:`Trunk.run`.
        """
        for i, (stage, block, tap, size, dtype) in enumerate(
            entries[0].events
        ):
            if stage > last:
                break
            if tap is None and on_end is None:
                continue
            parts = [
                self._codec.decode(
                    [t.to(device, non_blocking=True) for t in e.tensors[i]],
                    getattr(torch, dtype),
                )
                for e in entries
            ]
            value = torch.stack(parts) if len(parts) > 1 else parts[0][None]
            if tap is None:
                on_end(stage, StageEnd(value, tuple(size)))
            else:
                on_tap(stage, block, tap, value)

    # -- files --------------------------------------------------------------

    def _keys(
        self, trunk: Trunk, image: Tensor, taps: Sequence[str]
    ) -> list[str]:
        """Of each image: of its pixels, and of what is kept of the pass."""
        ends = [len(blocks) for blocks in trunk.blocks]
        kind = str((image.shape[1:], *taps, *ends, autocast_dtype(image)))
        keys = []
        for pixels in image.detach().cpu().contiguous():
            digest = sha256(kind.encode())
            digest.update(pixels.flatten().view(torch.uint8).numpy())
            keys.append(digest.hexdigest()[:32])
        return keys

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f'{key}.safetensors'

    def _read(self, key: str) -> Entry | None:
        """An entry; None if it is not there, cut off or of something else."""
        path = self._path(key)
        entry = self._entry(path, key)
        if entry is None and path.exists():
            self._left += 1  # it is counted, and will be written again
        return entry

    def _entry(self, path: Path, key: str) -> Entry | None:
        try:
            with safe_open(path, 'pt') as file:
                about = file.metadata() or {}
                if about.get('key') != key:
                    return None
                events = [
                    Event(*event) for event in json.loads(about['events'])
                ]
                names = set(file.keys())
                tensors = []
                for i in range(len(events)):
                    own = [f'{i}.{k}' for k in range(int(about['parts']))]
                    tensors.append([file.get_tensor(n) for n in own])
                    names -= {*own}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None
        return None if names or not events else Entry(events, tensors)

    def _write(self, key: str, entry: Entry) -> None:
        """Keep an entry; if there is no room, say so and keep no more."""
        path = self._path(key)
        content = save(
            {
                f'{i}.{k}': tensor
                for i, tensors in enumerate(entry.tensors)
                for k, tensor in enumerate(tensors)
            },
            dict(
                key=key,
                events=json.dumps(entry.events),
                parts=str(len(entry.tensors[0])),
            ),
        )
        # Of this process alone; another may write the same entry.
        own = path.with_suffix(f'.{os.getpid()}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < RESERVE + len(content):
                raise CheckpointError(
                    f'less than {RESERVE / GIB:g} GiB would be left.'
                )
            write_whole(own, content)
            os.replace(own, path)
        except (OSError, CheckpointError) as error:
            self._stop(
                f'the disk of {self.folder} has no room: {error}',
                logging.WARNING,
            )
            return
        self._left -= 1
        if self._left == 0:
            self._stop(
                'all views that were announced are kept. If later epochs are '
                'as slow as the first, pixels of views differ from epoch to '
                'epoch: pad images to one size'
            )

    def _stop(self, why: str, level: int = logging.INFO) -> None:
        self._left = 0
        print_log(
            f'trunk_cache: nothing more is written, {why}.', 'current', level
        )


def check_trunk(trunk: Trunk | None) -> None:
    """Refuse a trunk whose activations do not depend on the image alone.

    Args:
        trunk (Trunk, optional): None where gradients travel through it.
    """
    if trunk is None or trunk.options.drop_path:
        what = 'a tuner inside' if trunk is None else '`trunk_drop_path`'
        raise ConfigError(
            '`backbone.trunk_cache` expects a frozen trunk that gives the '
            f'same for the same image, but got {what}. Leave one of them out.'
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
