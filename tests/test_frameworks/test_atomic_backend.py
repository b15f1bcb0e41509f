"""Files are whole or not there, whatever happens to their writer."""

import errno
import os
import signal
import stat

import pytest
from mmengine.fileio import get_file_backend

from e3va_mm.errors import CheckpointError
from e3va_mm.frameworks.atomic_backend import (
    ATOMIC,
    AtomicLocalBackend,
    remove_parts,
)
from e3va_mm.utils import files


def backend():
    found = get_file_backend('some/path', backend_args=dict(backend=ATOMIC))
    assert isinstance(found, AtomicLocalBackend)
    return found


def test_bytes_and_text(tmp_path):
    backend().put(b'one', tmp_path / 'new' / 'a.pth')
    assert (tmp_path / 'new' / 'a.pth').read_bytes() == b'one'
    backend().put_text('äö', str(tmp_path / 'b'), encoding='latin-1')
    assert (tmp_path / 'b').read_bytes() == b'\xe4\xf6'
    assert backend().get(tmp_path / 'new' / 'a.pth') == b'one'


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')
    process = os.fork()
    if not process:
        files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        try:
            backend().put(b'new', path)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir() if p != path] == ['.a.pth.part']
    remove_parts(tmp_path, ['other*'])
    assert len(list(tmp_path.iterdir())) == 2
    remove_parts(tmp_path, ['b.pth', '*.pth'])
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_is_said(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError) as error:
        backend().put(b'new', tmp_path / 'file' / 'a.pth')
    text = str(error.value)
    assert 'MiB of room for' in text and 'Make room or choose' in text


@pytest.mark.parametrize('number', ['EINVAL', 'ENOTSUP', 'EACCES', 'EPERM'])
def test_mounts_that_do_not_sync_folders(tmp_path, monkeypatch, number):
    real, synced = os.fsync, []
    failing = OSError(getattr(errno, number), 'not here')

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise failing
        synced.append(file)
        real(file)

    monkeypatch.setattr(files.os, 'fsync', fsync)
    backend().put(b'new', tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').read_bytes() == b'new'
    assert len(synced) == 1
    failing.errno = errno.EIO
    with pytest.raises(CheckpointError, match='writing failed'):
        backend().put(b'newer', tmp_path / 'a.pth')


def test_a_file_that_is_not_synced_is_not_written(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.EINVAL, 'not here')

    monkeypatch.setattr(files.os, 'fsync', fsync)
    with pytest.raises(CheckpointError, match='writing failed'):
        backend().put(b'new', tmp_path / 'a.pth')
    assert not list(tmp_path.iterdir())
