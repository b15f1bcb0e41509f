"""Files that are written whole or not at all."""

import errno
import os
import shutil
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
