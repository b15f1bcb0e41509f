"""A full disk is one clear error; what was there before stays whole."""

import resource
import runpy
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import (
    find_spec,
    module_from_spec,
    spec_from_file_location,
)
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

MIB = 2**20
ROOT = Path(__file__).parents[2]


def _tool(name, folder='tools'):
    path = ROOT / folder / f'{name}.py'
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_converter(tmp_path, suffix):
    tool = _tool('vit2mm', 'tools/model_converters')
    out = tmp_path / f'vit{suffix}'
    tool.write({'a': torch.zeros(2)}, out)
    refused(out, lambda: tool.write({'a': torch.rand(64, 64)}, out))
    found = read_checkpoint(out)['state_dict']
    assert torch.equal(found['a'], torch.zeros(2))


def test_an_export(tmp_path):
    class Network(nn.Linear):
        def forward(self, inputs):
            return dict(x=super().forward(inputs))

    network = Network(64, 64)
    out = tmp_path / 'a.pt2'
    refused(out, lambda: export_network(network, torch.rand(1, 64), out))


# -- runs --------------------------------------------------------------------


def config(folder, work, **options):
    """A run of six iterations with a checkpoint after each."""
    pytest.importorskip('mmseg')
    make_segmentation(folder, 2)
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, **options))
    path, _, _ = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=0, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None",
        f"""
model['backbone']['out_indices'] = [3]
work_dir = {str(work)!r}
train_cfg = dict(max_iters=6, val_interval=100)
default_hooks = {hooks}
default_hooks['checkpoint']['by_epoch'] = False
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False)]
""",
    )
    return path


def whole_checkpoints(work):
    """Those in a folder, each read; ``last_checkpoint`` names one."""
    found = sorted(work.glob('*.pth'))
    for path in found:
        assert read_checkpoint(path)['meta']['iter'] > 0
    for path in work.glob('*.safetensors'):
        read_adapter(path)
    last = Path((work / 'last_checkpoint').read_text())
    assert last in found
    assert not list(work.glob('.*.part'))
    return [path.stem for path in found], last.stem


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk with room for a checkpoint and a half."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'a disk cannot be mounted here: {error}')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.parametrize('keep', [-1, 1])
def test_a_run_on_a_small_disk(small_disk, tmp_path, capsys, keep):
    work = small_disk / 'work'
    path = config(tmp_path, work, max_keep_ckpts=keep)
    assert train.main([str(path)]) == 1
    text = capsys.readouterr().err
    assert 'Traceback' not in text.rpartition('error: ')[2]
    assert f' MiB of room for {work}' in text
    assert 'No space left on device. The disk has ' in text
    assert 'Make room or choose another folder, and run it again.' in text
    names, last = whole_checkpoints(work)
    assert (names, last) == (['iter_1'], 'iter_1')

    remount = ['mount', '-o', 'remount,size=100m', str(small_disk)]
    subprocess.run(remount, check=True)
    assert train.main([str(path), '--resume']) == 0
    names, last = whole_checkpoints(work)
    assert last == 'iter_6'
    assert len(names) == (6 if keep == -1 else 1)


def test_a_run_under_a_limit(tmp_path, capsys):
    """As the above where nothing can be mounted: the second file is larger."""
    work = tmp_path / 'work'
    path = config(tmp_path, work)
    real = torch.save

    def save(content, file, *args, **kwargs):
        if content.get('meta', {}).get('iter') == 3:
            content['ballast'] = torch.zeros(4 * MIB)
        return real(content, file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, files_of_at_most(8 * MIB):
        patch.setattr(torch, 'save', save)
        assert train.main([str(path)]) == 1
    assert f'MiB of room for {work}/iter_3.pth, but' in capsys.readouterr().err
    assert whole_checkpoints(work) == (['iter_1', 'iter_2'], 'iter_2')


def test_under_the_framework_s_own_tool(tmp_path, monkeypatch):
    """With our hook in the config; its own leaves a part of a file."""
    work = tmp_path / 'work'
    path = config(tmp_path, work)
    tool = Path(find_spec('mmseg').origin).parent / '.mim/tools/train.py'
    options = [
        *('--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1'),
        'default_hooks.checkpoint.type=e3va_mm.AtomicCheckpointHook',
    ]
    real = torch.save

    def save(content, file, *args, **kwargs):
        if content.get('meta', {}).get('iter') == 3:
            content['ballast'] = torch.zeros(4 * MIB)
        return real(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, 'save', save)
    monkeypatch.setattr(sys, 'argv', [str(tool), str(path), *options])
    with files_of_at_most(8 * MIB):
        with pytest.raises(CheckpointError, match='iter_3.pth, but writing'):
            runpy.run_path(str(tool), run_name='__main__')
    assert whole_checkpoints(work) == (['iter_2'], 'iter_2')


def test_logs_on_a_full_disk(tmp_path, capsys, monkeypatch):
    path = config(tmp_path, tmp_path / 'work')

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


def test_a_source_beside_a_full_disk_stays(tmp_path):
    source = tmp_path / 'trunk.safetensors'
    save_file({'a': torch.rand(4)}, source)
    out = tmp_path / 'b.safetensors'
    refused(out, lambda: adapter(0).write(out))
    assert 'a' in read_checkpoint(source)['state_dict']
