"""Local files that a killed writer leaves whole, or not there at all."""

from collections.abc import Iterable
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from e3va_mm.utils.files import write_whole

# What a config gives as ``backend_args=dict(backend=...)``.
ATOMIC = 'e3va_mm_atomic'


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend of local files, with atomic writes.

    A file appears under its name once all of it is on the disk; until then
    the older one stays.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes.

        Args:
            obj (bytes): All of the file.
            filepath (str or Path): Its path; the folder is made.

        Raises:
            CheckpointError: If the folder has no room or cannot be written
                to.
        """
        write_whole(Path(filepath), obj)

    def put_text(
        self, obj: str, filepath: str | Path, encoding: str = 'utf-8'
    ) -> None:
        """Write text; arguments and errors as :meth:`put`."""
        self.put(obj.encode(encoding), filepath)


def register_atomic_backend() -> None:
    """Let configs and hooks name it, ``backend_args=dict(backend=ATOMIC)``."""
    register_backend(ATOMIC, AtomicLocalBackend)


def remove_parts(folder: Path, patterns: Iterable[str]) -> None:
    """Remove what killed writers have begun.

    Args:
        folder (Path): Where they wrote. Nobody may be writing there now.
        patterns (Iterable[str]): Names of the files that they meant to write,
            as for ``Path.glob``: ``'adapter_*.safetensors'``.
    """
    for pattern in patterns:
        for part in folder.glob(f'.{pattern}.part'):
            part.unlink(missing_ok=True)
