"""Checkpoints that are there, and whole, at every moment."""

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook

from e3va_mm.engine.hooks import AtomicCheckpointHook
from e3va_mm.errors import CheckpointError
from e3va_mm.frameworks.atomic_backend import AtomicLocalBackend
from tests.test_weights.toy_runner import ToyMetric, toy_runner


def run(folder, epochs, resume=False, **options):
    hook = dict(type='e3va_mm.AtomicCheckpointHook', interval=1, **options)
    runner = toy_runner(folder, epochs, resume=resume)
    # In the place of mmengine's own.
    runner._hooks = [
        each for each in runner.hooks if not isinstance(each, CheckpointHook)
    ]
    runner.register_hook(hook)
    runner.train()
    return runner


def names(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


def epochs(*numbers):
    return [f'epoch_{n}.pth' for n in numbers]


def last(folder):
    return Path((folder / 'last_checkpoint').read_text()).name


def test_files_are_those_of_mmengine(tmp_path):
    run(tmp_path, 3)
    assert names(tmp_path) == epochs(1, 2, 3)
    assert last(tmp_path) == 'epoch_3.pth'
    checkpoint = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    assert checkpoint['meta']['epoch'] == 3
    assert {'optimizer', 'message_hub', 'state_dict'} <= checkpoint.keys()


def test_the_newest_stay_also_after_a_resume(tmp_path):
    run(tmp_path, 3, max_keep_ckpts=2)
    assert names(tmp_path) == epochs(2, 3)
    runner = run(tmp_path, 4, resume=True, max_keep_ckpts=2)
    assert runner.iter == 4 * 4
    assert names(tmp_path) == epochs(3, 4)


@pytest.mark.parametrize('keep', [1, 2])
def test_at_every_step_of_saving_there_is_a_whole_one(
    tmp_path, keep, monkeypatch
):
    seen = []

    def look(function):
        def looking(*args):
            result = function(*args)
            if (tmp_path / 'last_checkpoint').exists():
                path = Path((tmp_path / 'last_checkpoint').read_text())
                assert zipfile.ZipFile(path).testzip() is None
                seen.append(path.name)
            return result

        return looking

    for name in ('replace', 'fsync'):
        monkeypatch.setattr(os, name, look(getattr(os, name)))
    monkeypatch.setattr(Path, 'unlink', look(Path.unlink))
    run(tmp_path, 3, max_keep_ckpts=keep)
    assert set(seen) == set(epochs(1, 2, 3))
    assert len(seen) >= 3 * 4


def test_what_a_kill_leaves_is_cleared(tmp_path, monkeypatch):
    """Killed when a new checkpoint is whole and the old one still there."""

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AtomicLocalBackend, 'remove', killed)
        with pytest.raises(Killed):
            run(tmp_path, 3, max_keep_ckpts=1)
    for name in ('.epoch_9.pth.part', '.last_checkpoint.part'):
        (tmp_path / name).touch()
    (tmp_path / '.own.txt.part').touch()
    assert names(tmp_path) == epochs(1, 2)
    assert last(tmp_path) == 'epoch_2.pth'
    run(tmp_path, 2, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == epochs(2)
    assert [p.name for p in tmp_path.glob('.*.part')] == ['.own.txt.part']
    run(tmp_path, 3, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == epochs(3)


def test_a_full_disk_leaves_the_old_ones(tmp_path, monkeypatch):
    real = os.replace

    def replace(old, new):
        if 'epoch_2' in str(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, 3, max_keep_ckpts=1)
    assert 'epoch_2.pth, but writing failed' in str(error.value)
    assert names(tmp_path) == epochs(1)
    assert last(tmp_path) == 'epoch_1.pth'


def test_the_best_is_whole_too(tmp_path, monkeypatch):
    written = []
    real = os.replace

    def replace(old, new):
        written.append(Path(new).name)
        real(old, new)

    monkeypatch.setattr(os, 'replace', replace)
    run(tmp_path, 1, save_best='acc', rule='greater')
    assert 'best_acc_epoch_1.pth' in written
    assert 'best_acc_epoch_1.pth' in names(tmp_path)


@pytest.fixture
def better(monkeypatch):
    """Scores that rise with every validation, in two metrics."""
    scores = iter(range(1, 9))

    def compute_metrics(self, results):
        score = next(scores)
        return dict(acc=score / 10, loss=1 - score / 10)

    monkeypatch.setattr(ToyMetric, 'compute_metrics', compute_metrics)


TWO = dict(save_best=['acc', 'loss'], rule=['greater', 'less'])


@pytest.mark.parametrize(
    'options, bests',
    [
        (dict(save_best='acc', rule='greater'), ['best_acc']),
        (dict(save_best='auto'), ['best_acc']),
        (TWO, ['best_acc', 'best_loss']),
    ],
)
def test_a_better_one_takes_the_place_of_the_best(
    tmp_path, better, options, bests
):
    for epoch in (2, 3):
        runner = run(tmp_path, epoch, resume=epoch > 2, **options)
        expected = [f'{best}_epoch_{epoch}.pth' for best in bests]
        assert sorted(p.name for p in tmp_path.glob('best*')) == expected
    for key, path in runner.message_hub.runtime_info.items():
        if key.startswith('best_ckpt'):
            assert Path(path).is_file()


@pytest.mark.parametrize(
    'options, best',
    [
        (dict(save_best='acc', rule='greater'), 'best_ckpt'),
        (TWO, 'best_ckpt_loss'),
    ],
)
def test_a_full_disk_leaves_the_best(
    tmp_path, better, monkeypatch, options, best
):
    real = os.replace
    kind = options['save_best'][-1] if options is TWO else 'acc'

    def replace(old, new):
        if f'best_{kind}_epoch_2' in str(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(os, 'replace', replace)
    first = tmp_path / f'best_{kind}_epoch_1.pth'
    with pytest.raises(CheckpointError, match=f'best_{kind}_epoch_2.pth'):
        run(tmp_path, 3, **options)
    assert zipfile.ZipFile(first).testzip() is None
    # Nor does the newest checkpoint name a best one that is not there.
    newest = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert newest['message_hub']['runtime_info'][best] == str(first)


def test_no_file_of_other_folders_is_removed(tmp_path, better):
    """Where a checkpoint says that the best one is, anything may be."""
    best = dict(save_best='acc', rule='greater')
    run(tmp_path / 'a', 1, **best)
    private = tmp_path / 'private'
    private.mkdir()
    path = tmp_path / 'a' / 'epoch_1.pth'
    content = torch.load(path, weights_only=False)
    content['message_hub']['runtime_info']['best_ckpt'] = str(private)
    torch.save(content, path)
    run(tmp_path / 'a', 2, resume=True, **best)
    assert private.is_dir()
    assert (tmp_path / 'a' / 'best_acc_epoch_2.pth').is_file()


def test_the_same_best_is_written_again(tmp_path, better):
    best = dict(save_best='acc', rule='greater')
    run(tmp_path, 1, **best)
    path = tmp_path / 'epoch_1.pth'
    content = torch.load(path, weights_only=False)
    info = content['message_hub']['runtime_info']
    info['best_ckpt'] = str(tmp_path / 'best_acc_epoch_2.pth')
    torch.save(content, path)
    (tmp_path / 'best_acc_epoch_2.pth').touch()
    run(tmp_path, 2, resume=True, **best)
    assert (tmp_path / 'best_acc_epoch_2.pth').stat().st_size


def test_another_folder_and_backend(tmp_path):
    run(tmp_path / 'work', 1, out_dir=str(tmp_path / 'out'))
    assert names(tmp_path / 'out' / 'work') == epochs(1)
    other = dict(backend='local')
    runner = run(tmp_path / 'work', 1, backend_args=other)
    (hook,) = (h for h in runner.hooks if isinstance(h, AtomicCheckpointHook))
    assert hook.backend_args == other
