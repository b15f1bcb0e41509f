"""Files that are written whole or not at all, and finding whole ones."""

import errno
import os
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path

from e3va_mm.errors import CheckpointError
from e3va_mm.utils.sizes import MIB

# What network and FUSE mounts say of the fsync of a folder.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def file_sha256(source: str | None) -> str | None:
    """SHA-256 of a local file; None for what is none."""
    path = Path(source or '').expanduser()
    if not path.is_file():
        return None
    digest = sha256()
    with path.open('rb') as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, whatever happens meanwhile.

    Args:
        path (Path): The file; an older one is replaced at the end.
        content (bytes): All of it.

    Raises:
        CheckpointError: If the folder has no room or cannot be written to.
    """
    temporary = path.with_name(f'.{path.name}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open('wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f'Expected {len(content) / MIB:,.1f} MiB of room for {path}, but '
            f'writing failed: {error}. {_free(path.parent)} Files that were '
            'there before are whole. Make room or choose another folder, and '
            'run it again.'
        ) from error


def _sync_folder(folder: Path) -> None:
    """Have new names outlast a loss of power, where a mount can do that."""
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def _free(folder: Path) -> str:
    """How much room a disk has, as far as the system says it."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return 'The folder is not there.'
    # Another limit, such as a quota, may be lower.
    return f'The disk has {free / MIB:,.1f} MiB free.'


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that a killed writer has left whole.

    mmengine's CheckpointHook writes in place: ``last_checkpoint`` can be empty
    or name a file that is gone, and a ``.pth`` can lack its end.

    Args:
        folder (Path): The work folder of a run.

    Returns:
        Path, optional: What ``last_checkpoint`` names, if that is whole, else
        the newest ``epoch_*.pth`` or ``iter_*.pth``. None if there is no
        whole one. Only the end of a file is looked at.
    """
    last = folder / 'last_checkpoint'
    named = Path(last.read_text().strip()) if last.is_file() else Path()
    # Some strategies write folders.
    if named != Path() and (named.is_dir() or zipfile.is_zipfile(named)):
        return named
    found = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    whole = [path for path in found if zipfile.is_zipfile(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)
