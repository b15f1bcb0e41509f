import pickle
import zipfile

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import FlexibleRunner
from safetensors.torch import save_file
from torch import nn

from e3va_mm.weights import file_formats, read_checkpoint
from tests.test_weights import toy_runner as toy_module
from tests.test_weights.samples import refusal_of, saved, weights
from tests.test_weights.toy_runner import toy_runner


@pytest.mark.parametrize('zipped', [True, False])
def test_a_state_dict_is_read_as_it_was_saved(tmp_path, zipped):
    content = {'state_dict': weights(), 'meta': {'epoch': 3, 'name': 'a'}}
    path = saved(
        tmp_path / 'a.pth', content, _use_new_zipfile_serialization=zipped
    )
    found = read_checkpoint(path)
    assert found['meta'] == content['meta']
    for key, value in weights().items():
        assert torch.equal(found['state_dict'][key], value)


def test_home_and_map_location(tmp_path, monkeypatch):
    saved(tmp_path / 'a.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    found = read_checkpoint('~/a.pth', map_location='meta')
    assert found['weight'].device.type == 'meta'


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'a'])
def test_safetensors_are_known_by_name_or_content(tmp_path, name):
    path = tmp_path / name
    save_file(weights(), path, metadata={'trunk': 'nano'})
    found = read_checkpoint(path)
    assert found['meta'] == {'trunk': 'nano'}
    assert found['state_dict'].keys() == weights().keys()
    for key, value in weights().items():
        assert torch.equal(found['state_dict'][key], value)


@pytest.mark.parametrize('place', ['cpu', None, torch.device('cpu'), {}])
def test_safetensors_take_every_kind_of_map_location(tmp_path, place):
    path = tmp_path / 'a.safetensors'
    save_file(weights(), path)
    weight = read_checkpoint(path, place)['state_dict']['weight']
    assert weight.device.type == 'cpu'


@pytest.mark.parametrize(
    'data, text',
    [
        (b'', 'is empty (0 bytes)'),
        (b'<!DOCTYPE html><p>Not found', "begins with '<!DOCTYPE html>"),
        (b'version https://git-lfs.github.com/spec/v1', 'Git LFS pointer'),
        (b'a checkpoint\n', "begins with 'a checkpoint'"),
        (b'\x80', 'cannot be read as a checkpoint'),
        (bytes(range(256)) * 4, 'cannot be read as a checkpoint'),
        (pickle.dumps({'a': 1}, protocol=2), 'cannot be read as a checkpoint'),
    ],
)
def test_what_is_no_checkpoint(tmp_path, data, text):
    path = tmp_path / 'a.pth'
    path.write_bytes(data)
    refusal = refusal_of(path)
    assert text in refusal and refusal.startswith(str(path))
    assert refusal.endswith('.')


def test_other_archives(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    assert 'is a zip archive, but no checkpoint' in refusal_of(path)
    torch.jit.trace(nn.ReLU(), torch.ones(1)).save(str(path))
    assert 'is a TorchScript program' in refusal_of(path)


def test_a_cut_or_damaged_archive(tmp_path):
    path = saved(tmp_path / 'a.pth')
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    text = refusal_of(path)
    assert 'is incomplete: it ends after 1000 bytes' in text
    assert 'compare its size with the original' in text
    flipped = bytearray(data)
    flipped[data.index(weights()['weight'].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(flipped)
    assert 'the checksum of its record' in refusal_of(path)


def test_a_missing_file_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refusal_of('no/such.pth')
    assert text.startswith(f'no/such.pth does not exist in {tmp_path}. ')
    path = tmp_path / 'such.pth'
    assert refusal_of(path).startswith(f'{path} does not exist. ')
    assert refusal_of('/dev/null').startswith('/dev/null is no file. ')


def _program(tmp_path):
    """A config that touches a file wherever it is read, and that file."""
    marker = tmp_path / 'marker'
    return f"__import__('os').system('touch {marker}')\n", marker


@pytest.mark.parametrize('runner_class', [Runner, FlexibleRunner])
def test_a_config_of_a_run_is_no_program_in_a_resume(
    tmp_path, trained, monkeypatch, runner_class
):
    monkeypatch.setattr(toy_module, 'Runner', runner_class)
    config, marker = _program(tmp_path)
    content = read_checkpoint(trained[1] / 'epoch_1.pth')
    content['meta']['config'] = config
    path = saved(tmp_path / 'hostile.pth', content)
    # mmengine's FlexibleRunner resumes before its EMAHook is ready.
    monkeypatch.delattr(EMAHook, 'after_load_checkpoint')
    runner = toy_runner(tmp_path, 2, resume=True, load_from=str(path))
    runner.train()
    assert runner.iter == 2 * 4
    assert not marker.exists()
    Config.fromstring(config, '.py')
    assert marker.exists()


def test_metadata_of_safetensors_are_no_program_either(tmp_path):
    config, marker = _program(tmp_path)
    path = tmp_path / 'a.safetensors'
    save_file(weights(), path, dict(epoch='1', iter='1', config=config))
    runner = toy_runner(tmp_path, 2, resume=True, load_from=str(path))
    with pytest.raises(KeyError, match='message_hub'):
        runner.train()
    assert not marker.exists()


def test_a_config_is_left_out_with_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        file_formats, 'print_log', lambda *a, **_: said.append(*a)
    )
    meta = dict(config='a = 1', cfg='a = 2', epoch=3)
    path = saved(tmp_path / 'a.pth', dict(state_dict=weights(), meta=meta))
    assert read_checkpoint(path)['meta'] == dict(cfg='a = 2', epoch=3)
    (text,) = said
    assert text.startswith(f'{path}: its `meta.config` was left out')


def test_parts_beside_the_model_have_names_of_any_kind(tmp_path):
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = {0: torch.ones(2), ('a', 1): [torch.ones(3)]}
    for name in ('state_dict', 'model'):
        content = {
            name: network.state_dict(),
            'optimizer': optimizer.state_dict(),
            'flat': other,
        }
        found = read_checkpoint(saved(tmp_path / 'a.pth', content))
        assert torch.equal(found['flat'][0], other[0])
        state = found['optimizer']['state']
        assert state[0]['momentum_buffer'].shape == (2, 2)
    path = saved(tmp_path / 'a.pth', {'teacher': other})
    assert 'under 0, which is no name' in refusal_of(path)


def test_expanded_tensors_are_read_up_to_a_bound(tmp_path, monkeypatch):
    wide = torch.arange(64).expand(512, 64)  # 256 KiB of 512 bytes
    content = {'state_dict': {'a': wide}}
    path = saved(tmp_path / 'a.pth', content)
    assert path.stat().st_size < wide.nbytes
    found = read_checkpoint(path)['state_dict']['a']
    assert torch.equal(found, wide)
    monkeypatch.setattr(file_formats, 'EXPANDED', 2 * wide.nbytes)
    names = dict.fromkeys('abc', wide)
    path = saved(tmp_path / 'b.pth', {'state_dict': names})
    assert 'of 262,144 bytes, more than the file' in refusal_of(path)


def test_tied_weights_are_not_expanded(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, 'EXPANDED', 0)
    tied = torch.rand(64, 64)
    path = saved(tmp_path / 'a.pth', {f'{i}.weight': tied for i in range(9)})
    assert len(read_checkpoint(path)) == 9
