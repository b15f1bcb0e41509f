"""Folders that save_pretrained writes, and addresses of Hugging Face."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import read_checkpoint
from e3va_mm.weights.hub import read_hub

constants = pytest.importorskip('huggingface_hub.constants')
STATE = {'a': torch.ones(2), 'b': torch.zeros(3)}
WRITE = {
    'model.safetensors': save_file,
    'pytorch_model.bin': torch.save,
}


def written(folder, name, shards):
    """A folder with weights, whole or one tensor to a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text('{}')
    if not shards:
        WRITE[name](STATE, folder / name)
        return
    stem, ending = name.split('.')
    index = {}
    for i, (key, value) in enumerate(STATE.items(), 1):
        shard = f'{stem}-{i:05}-of-00002.{ending}'
        WRITE[name]({key: value}, folder / shard)
        index[key] = shard
    text = json.dumps(dict(metadata={}, weight_map=index))
    (folder / f'{name}.index.json').write_text(text)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An offline cache of huggingface_hub: where it has a repository."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    repository = tmp_path / 'hub' / 'models--org--name'
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text('0' * 40)
    return repository / 'snapshots' / ('0' * 40)


def check(content):
    found = content.get('state_dict', content)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize('shards', [False, True])
@pytest.mark.parametrize('name', WRITE)
def test_a_folder_and_a_repository_are_read(name, shards, offline):
    written(offline, name, shards)
    check(read_checkpoint(offline))
    check(read_checkpoint('hf://org/name'))
    if not shards:
        check(read_checkpoint(f'hf://org/name@main/{name}'))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='expected model.safetensors,'):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize('content', ['[]', '{"weight_map": 3}', 'no json'])
def test_a_spoilt_index_is_refused(content, tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text(content)
    with pytest.raises(CheckpointError, match='is no index of shards'):
        read_checkpoint(tmp_path)


def test_a_shard_that_is_missing_is_named(offline):
    written(offline, 'model.safetensors', True)
    (offline / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(CheckpointError, match='00002-of-00002.*not exist'):
        read_checkpoint('hf://org/name')


def test_a_repository_that_cannot_be_fetched(offline):
    address = 'hf://org/other'
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(address)
    text = str(error.value)
    assert text.startswith(f'{address} cannot be fetched, and is not in ')
    assert '`hf auth login`' in text


@pytest.mark.parametrize('address', ['hf://name', 'hf:///a', 'hf://a/b@'])
def test_an_address_of_another_form_is_refused(address):
    expected = re.escape('hf://ORG/NAME[@REVISION][/FILE]')
    with pytest.raises(CheckpointError, match=expected):
        read_hub(address, 'cpu')
