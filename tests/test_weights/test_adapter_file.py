"""What is in an adapter file, and which files are refused."""

import copy
import json

import numpy as np
import pytest
import torch
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils import files
from e3va_mm.weights import (
    AdapterFile,
    TrunkRecord,
    adapter_of,
    fingerprint,
    read_adapter,
    read_checkpoint,
    trunk_records,
)
from e3va_mm.weights.adapter_extraction import check_adapter
from e3va_mm.weights.fingerprint import checksum
from tests.adapted_models import segmentor, trained, trunk_file
from tests.test_compatibility import older
from tests.test_weights.samples import refusal_of, weights
from tests.test_weights.toy_runner import Toy

META = dict(classes=('cat', 'dog'), palette=[(1, 2, 3), (4, 5, 6)])


def adapter(**kwargs):
    trunks = {'backbone.': TrunkRecord('trunk.pth', 'abc', None)}
    kwargs = dict(dict(config='a = 1', dataset_meta=META), **kwargs)
    return AdapterFile(weights(), trunks, ('weight',), **kwargs)


def written(path, **kwargs):
    adapter(**kwargs).write(path)
    return path


@pytest.fixture(scope='module')
def mit(tmp_path_factory):
    """A trained segmentor on a MiT and its adapter file."""
    folder = tmp_path_factory.mktemp('mit')
    model = trained('mit', trunk_file(folder, 'mit'))
    path = folder / 'adapter.safetensors'
    adapter_of(model, trunk_records(model), dataset_meta=META).write(path)
    return model, path


def test_everything_comes_back(tmp_path):
    path = written(tmp_path / 'new' / 'a.safetensors')
    found = read_adapter(path)
    assert found.tensors.keys() == weights().keys()
    for name, value in weights().items():
        assert torch.equal(found.tensors[name], value)
    expected = adapter()
    for name in ('trunks', 'trainable', 'config', 'dataset_meta', 'part'):
        assert getattr(found, name) == getattr(expected, name), name


def test_as_a_checkpoint_of_mmengine(tmp_path):
    path = written(tmp_path / 'a.safetensors')
    found = read_checkpoint(path)
    assert found['meta']['dataset_meta'] == META
    assert found['meta']['cfg'] == 'a = 1'
    record = found['state_dict'].pop('backbone.side_path.trunk_record')
    assert TrunkRecord.from_tensor(record) == TrunkRecord(
        'trunk.pth', 'abc', None, str(path), 'model'
    )
    assert found['state_dict'].keys() == weights().keys()


def test_metadata_are_strings_that_others_read(mit):
    model, path = mit
    with safe_open(path, 'pt') as file:
        meta = file.metadata()
        keys = set(file.keys())
    assert meta['format'] == 'pt'
    assert meta['e3va_mm.format'] == '1'
    trainable = json.loads(meta['e3va_mm.trainable'])
    assert trainable == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert set(trainable) < keys
    trunk = json.loads(meta['e3va_mm.trunks'])['backbone.']
    assert trunk['source'] == model.backbone.trunk_address
    assert trunk['sha256'] == files.file_sha256(trunk['source'])
    assert len(trunk['sha256']) == len(trunk['fingerprint']) == 64


def test_all_but_the_trunk(mit):
    model, path = mit
    state = model.state_dict()
    trunk = {f'backbone.{key}' for key in model.backbone.trunk_state()}
    found = load_file(path)
    assert found.keys() == state.keys() - trunk
    assert any('running_mean' in key for key in found)
    for key, value in found.items():
        assert torch.equal(value, state[key]), key


def test_a_file_of_before_adapters_were_stacked_fits(mit, tmp_path):
    model, path = mit
    found = read_adapter(path)
    new = dict(found.tensors)
    found.tensors.update(older(model, new))
    for key in new.keys() - older(model, new).keys():
        del found.tensors[key]
    assert found.tensors.keys() != new.keys()
    found.write(tmp_path / 'older.safetensors')
    twin = copy.deepcopy(model)
    for parameter in twin.backbone.tuner.parameters():
        parameter.data.zero_()
    state = read_checkpoint(tmp_path / 'older.safetensors')['state_dict']
    check_adapter(twin, state)
    load_state_dict(twin, state)
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def test_what_shares_memory_is_written(tmp_path):
    shared = torch.rand(4, 6)
    tensors = dict(a=shared, b=shared, c=shared.t(), d=shared[1:])
    AdapterFile(tensors, {}, ()).write(tmp_path / 'a.safetensors')
    found = read_adapter(tmp_path / 'a.safetensors').tensors
    for name, value in tensors.items():
        assert torch.equal(found[name], value)


def test_meta_of_data_sets(tmp_path):
    meta = dict(
        classes=['cat'],
        palette=np.array([[1, 2, 3]], 'uint8'),
        label_map={0: 1},
        count=np.int64(3),
        task=dict(label_map={0: 1}, pairs={(0, 1): 2}, classes=['dog']),
    )
    path = written(tmp_path / 'a.safetensors', dataset_meta=meta)
    assert read_adapter(path).dataset_meta == dict(
        classes=('cat',),
        palette=[(1, 2, 3)],
        count=3,
        task=dict(classes=['dog']),
    )


def test_the_fingerprint_is_of_values_shapes_and_names():
    state = dict(a=torch.rand(2, 6).bfloat16(), b=torch.arange(3))
    same = dict(b=state['b'].int(), a=state['a'].float())
    assert fingerprint(state) == fingerprint(same)
    others = (
        dict(state, a=state['a'].reshape(3, 4)),
        dict(state, b=torch.tensor([0, 1, 3])),
        dict(state, a=state['a'].float() * (1 + 1e-6)),
        dict(a=state['a'], c=state['b']),
    )
    assert len({fingerprint(each) for each in (state, *others)}) == 5


def test_no_flipped_bit_of_the_header_hides_what_a_file_is(tmp_path):
    path = written(tmp_path / 'a.safetensors', config='', dataset_meta={})
    content = path.read_bytes()
    plain = read_checkpoint(path)['state_dict']
    end = 8 + int.from_bytes(content[:8], 'little')
    for place in range(end):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)['state_dict']
        except CheckpointError:
            continue
        # Blanks of the header say nothing, nor does the framework's mark.
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)


def signed(path, **changes):
    """An adapter file with other metadata and the right checksum."""
    with safe_open(written(path), 'pt') as file:
        meta = {k: v for k, v in file.metadata().items() if k != 'format'}
    meta.pop('e3va_mm.sha256')
    for name, text in changes.items():
        meta[f'e3va_mm.{name}'] = text
        if text is None:
            del meta[f'e3va_mm.{name}']
    meta['e3va_mm.sha256'] = checksum(weights(), meta)
    save_file(weights(), path, meta)
    return path


@pytest.mark.parametrize(
    'changes',
    [
        dict(trunks='[]'),
        dict(trunks='{"backbone.": {"source": ["rm"]}}'),
        dict(trunks='{"backbone.": 3}'),
        dict(trunks='not json'),
        dict(trainable='3'),
        dict(dataset_meta='[1]'),
        dict(dataset_meta='{"palette": [1]}'),
        dict(config=None),
    ],
)
def test_metadata_made_by_hand_are_refused(tmp_path, changes):
    text = refusal_of(signed(tmp_path / 'a.safetensors', **changes))
    assert 'has metadata that no adapter file has' in text
    assert 'Write it again with tools/adapter.py' in text


def test_another_format_is_refused(tmp_path):
    path = signed(tmp_path / 'a.safetensors', format='2', version='9.0')
    text = refusal_of(path)
    assert 'an adapter file of the format 2, but e3va_mm' in text
    assert 'Use the version that wrote it (9.0) or a later one' in text


def test_another_file_is_no_adapter_file(tmp_path):
    save_file(weights(), tmp_path / 'a.safetensors', dict(author='me'))
    torch.save(weights(), tmp_path / 'a.pth')
    for name in ('a.safetensors', 'a.pth'):
        text = refusal_of(tmp_path / name, read_adapter)
        assert 'is no adapter file. `tools/adapter.py extract` makes' in text
    assert read_checkpoint(tmp_path / 'a.safetensors')['meta'] == dict(
        author='me'
    )


def test_a_record_that_is_none_is_refused():
    with pytest.raises(CheckpointError, match='Expected the record of a tr'):
        TrunkRecord.from_tensor(torch.zeros(3, dtype=torch.uint8))


def test_a_model_without_a_side_path_has_none():
    with pytest.raises(ConfigError) as error:
        trunk_records(Toy())
    assert 'no backbone of this Toy has a tuner' in str(error.value)


def test_a_trunk_that_cannot_be_read_again_is_refused(tmp_path):
    model = segmentor('mit', None)
    with pytest.raises(ConfigError, match='but they are random'):
        trunk_records(model)
    model.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match='but they are of a checkpoint'):
        trunk_records(model)
    records = trunk_records(model, {'backbone.': 'https://a.b/c.pth'})
    assert records['backbone.'].source == 'https://a.b/c.pth'
    assert records['backbone.'].sha256 is None


CHANGES = {
    'lacks a weight of the head': (
        lambda s: s.pop('decode_head.conv_seg.weight'),
        '1 missing in the file',
    ),
    'lacks a buffer of the head': (
        lambda s: s.pop('decode_head.convs.0.bn.running_mean'),
        '1 missing in the file',
    ),
    'has a weight too much': (
        lambda s: s.update({'neck.weight': torch.zeros(1)}),
        '1 not expected',
    ),
    'has another number of classes': (
        lambda s: s.update({'decode_head.conv_seg.weight': torch.zeros(4)}),
        '1 of another shape',
    ),
    'lacks a weight of the side path': (
        lambda s: s.pop('backbone.side_path.stages.0.up.q'),
        '1 missing in the file',
    ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_one_error_for_all_that_does_not_fit(mit, tmp_path, change):
    model, path = mit
    found = read_adapter(path)
    alter, expected = CHANGES[change]
    alter(found.tensors)
    bad = tmp_path / 'bad.safetensors'
    found.write(bad)
    other = segmentor('mit', None)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(other, str(bad))
    text = str(error.value)
    assert f'{bad} does not fit the EncoderDecoder without its trunk' in text
    assert expected in text
    assert 'Take the config that the adapter file was trained with' in text
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_stock_model_refuses_it(mit):
    with pytest.raises(CheckpointError, match='does not fit the Toy'):
        load_checkpoint(Toy(), str(mit[1]))


def test_the_backbone_alone(mit, tmp_path):
    model, path = mit
    part = read_adapter(path).without_heads()
    assert all(key.startswith('backbone.') for key in part.tensors)
    assert set(part.trainable) == {
        name
        for name, value in model.named_parameters()
        if value.requires_grad and name.startswith('backbone.')
    }
    part.write(tmp_path / 'part.safetensors')
    other = segmentor('mit', None)
    head = other.decode_head.conv_seg.weight.clone()
    load_checkpoint(other, str(tmp_path / 'part.safetensors'))
    expected = model.backbone.state_dict()
    for key, value in other.backbone.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert torch.equal(other.decode_head.conv_seg.weight, head)
