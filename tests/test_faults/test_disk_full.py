"""A full disk is one clear error; what was there before stays whole."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from e3va_mm.commands import train
from e3va_mm.errors import CheckpointError
from e3va_mm.export import export_network
from e3va_mm.utils.files import write_whole
from e3va_mm.weights import (
    AdapterFile,
    TrunkRecord,
    read_adapter,
    read_checkpoint,
)
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
)
from tests.test_engine.test_hooks.toy import toy_config

MIB = 2**20


@contextmanager
def files_of_at_most(size):
    """No file may grow beyond ``size`` bytes, as under a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(path, call):
    """The text of the error; the folder is as it was."""
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    with files_of_at_most(4096), pytest.raises(CheckpointError) as error:
        call()
    after = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    assert after == before
    text = str(error.value)
    assert f' MiB of room for {path}, but writing failed: ' in text
    assert 'File too large. The disk has ' in text
    assert 'Files that were there before are whole. Make room or' in text
    return text


def adapter(seed):
    torch.manual_seed(seed)
    trunks = {'backbone.': TrunkRecord('trunk.pth', 'abc', None)}
    tensors = {'backbone.side_path.a': torch.rand(64, 64), 'b': torch.rand(2)}
    return AdapterFile(tensors, trunks, ('b',))


def test_an_adapter_file(tmp_path):
    path = tmp_path / 'a.safetensors'
    refused(path, lambda: adapter(0).write(path))
    adapter(0).write(path)
    refused(path, lambda: adapter(1).write(path))
    expected = adapter(0).tensors['b']
    assert torch.equal(read_adapter(path).tensors['b'], expected)


def test_the_error_says_how_much_is_needed_and_free(tmp_path):
    text = refused(
        tmp_path / 'a', lambda: write_whole(tmp_path / 'a', bytes(3 * MIB))
    )
    assert text.startswith('Expected 3.0 MiB of room for ')
    with pytest.raises(CheckpointError) as error:
        write_whole(Path('/proc/none/a'), b'')
    assert 'The folder is not there.' in str(error.value)


def test_an_export(tmp_path):
    class Network(nn.Linear):
        def forward(self, inputs):
            return dict(x=super().forward(inputs))

    network = Network(64, 64)
    out = tmp_path / 'a.pt2'
    refused(out, lambda: export_network(network, torch.rand(1, 64), out))


# -- runs --------------------------------------------------------------------


@pytest.mark.parametrize('keep', [-1, 1])
def test_a_run_under_a_limit(tmp_path, monkeypatch, keep):
    """The third checkpoint is larger; with room the run goes on."""
    atomic = dict(type='e3va_mm.AtomicCheckpointHook', by_epoch=False)
    config = toy_config(
        custom_hooks=[
            dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False)
        ],
        default_hooks=dict(
            checkpoint=dict(atomic, interval=1, max_keep_ckpts=keep)
        ),
    )
    real = torch.save

    def save(content, file, *args, **kwargs):
        if content.get('meta', {}).get('iter') == 3:
            content['ballast'] = torch.zeros(4 * MIB)
        return real(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, 'save', save)
    text = f'MiB of room for {tmp_path}/iter_3.pth, but writing failed'
    with files_of_at_most(8 * MIB), pytest.raises(CheckpointError, match=text):
        run(config, tmp_path)
    whole = [['iter_1', 'iter_2'], ['iter_2']][keep == 1]
    assert sorted(path.stem for path in tmp_path.glob('*.pth')) == whole
    for path in tmp_path.glob('*.pth'):
        assert read_checkpoint(path)['meta']['iter'] > 0
    for path in tmp_path.glob('*.safetensors'):
        read_adapter(path)
    last = Path((tmp_path / 'last_checkpoint').read_text())
    assert last.stem == 'iter_2'
    assert not list(tmp_path.glob('.*.part'))
    assert run(config, tmp_path, resume=True).iter == 7


def test_logs_on_a_full_disk(tmp_path, capsys, monkeypatch):
    make_segmentation(tmp_path, 2)
    path = segmentation_config(tmp_path)

    def fail(runner):
        raise OSError(28, 'No space left on device', 'scalars.json')

    monkeypatch.setattr('mmengine.runner.Runner.train', fail)
    assert train.main([str(path)]) == 1
    text = capsys.readouterr().err.rpartition('error: ')[2]
    assert text.startswith(
        f'No room for the files of a run (work_dir {tmp_path / "work"}, file '
        'scalars.json): '
    )
    assert 'continue with --resume' in text
