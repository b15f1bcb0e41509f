"""What to resume from where `last_checkpoint` is of no use."""

import os

import pytest
import torch

from e3va_mm.utils.files import newest_whole


@pytest.fixture
def folder(tmp_path):
    """Two whole checkpoints and a newer one without its end."""
    names = ('epoch_9.pth', 'epoch_10.pth', 'epoch_11.pth')
    for i, name in enumerate(names):
        path = tmp_path / name
        torch.save(dict(weight=torch.ones(100)), path)
        os.utime(path, (i, i))
    half = path.read_bytes()
    path.write_bytes(half[: len(half) // 2])
    torch.save({}, tmp_path / 'best_mAP_epoch_10.pth')
    return tmp_path


def test_what_is_named_comes_first(folder):
    path = folder / 'epoch_9.pth'
    (folder / 'last_checkpoint').write_text(str(path))
    assert newest_whole(folder) == path
    strategy = folder / 'epoch_12.pth'
    strategy.mkdir()
    (folder / 'last_checkpoint').write_text(str(strategy))
    assert newest_whole(folder) == strategy


@pytest.mark.parametrize('named', [None, '', 'gone.pth', 'epoch_11.pth'])
def test_else_the_newest_whole_one(folder, named):
    if named is not None:
        text = named and str(folder / named)
        (folder / 'last_checkpoint').write_text(text)
    assert newest_whole(folder) == folder / 'epoch_10.pth'


def test_none(tmp_path):
    assert newest_whole(tmp_path) is None
    (tmp_path / 'last_checkpoint').touch()
    (tmp_path / 'iter_1.pth').write_bytes(b'PK')
    assert newest_whole(tmp_path) is None
