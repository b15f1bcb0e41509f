"""An adapter file alone brings the trunk that it was trained on."""

import shutil
from dataclasses import replace

import pytest
import torch
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from e3va_mm.backbones import trunk_backbone
from e3va_mm.errors import CheckpointError
from e3va_mm.weights import (
    adapter_of,
    fingerprint,
    read_adapter,
    read_checkpoint,
    trunk_records,
)
from tests.adapted_models import HEADS, segmentor, trained, trunk_file
from tests.trunk_cases import awake

CASES = pytest.mark.parametrize('name', HEADS)


def written(model, path):
    adapter_of(model, trunk_records(model)).write(path)
    return path


@pytest.fixture
def mit(tmp_path):
    """A trained segmentor, its adapter file, and the trunk's file."""
    source = trunk_file(tmp_path, 'mit')
    model = trained('mit', source)
    return model, written(model, tmp_path / 'a.safetensors'), source


def load(model, path):
    load_checkpoint(model, str(path))
    return model.eval()


def assert_same(model, other):
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def count_reads(monkeypatch):
    read = []

    real = trunk_backbone.read_checkpoint

    def count(source):
        read.append(source)
        return real(source)

    monkeypatch.setattr(trunk_backbone, 'read_checkpoint', count)
    return read


@CASES
def test_round_trip_without_init_weights(name, tmp_path):
    source = trunk_file(tmp_path, name)
    model = trained(name, source)
    path = written(model, tmp_path / 'a.safetensors')
    # As the frameworks' inference functions build it.
    other = load(segmentor(name, None), path)
    assert_same(other, model)
    assert other.backbone.trunk_address == str(source)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image, mode='tensor')
        assert torch.equal(other(image, mode='tensor'), expected)
        other.backbone.side_path.apply(
            lambda m: [p.zero_() for p in m.parameters(False)]
        )
        # What this rests on: the side path takes part.
        assert not torch.equal(other(image, mode='tensor'), expected)


@CASES
def test_a_file_of_the_file_is_the_same(name, tmp_path):
    model = trained(name, trunk_file(tmp_path, name))
    first = written(model, tmp_path / 'a.safetensors')
    again = load(segmentor(name, None), first)
    second = written(again, tmp_path / 'b.safetensors')
    first, second = read_adapter(first), read_adapter(second)
    assert first.tensors.keys() == second.tensors.keys()
    for key, value in first.tensors.items():
        assert torch.equal(value, second.tensors[key]), key
    none = dict(tensors={})
    assert replace(first, **none) == replace(second, **none)


@CASES
@pytest.mark.parametrize(
    'side_path', [dict(trunk_weights='bf16'), dict(preset='lean')], ids=str
)
def test_stored_coarser_it_has_the_same_fingerprint(name, side_path, tmp_path):
    source = trunk_file(tmp_path, name)
    exact = trained(name, source)
    coarse = trained(name, source, **side_path)
    expected = trunk_records(exact)
    assert trunk_records(coarse) == expected
    with torch.no_grad():
        coarse(torch.randn(1, 3, 64, 64), mode='tensor')
    weights = [p for p in coarse.backbone.parameters() if p.ndim == 2]
    assert any(p.dtype == torch.bfloat16 for p in weights)
    assert trunk_records(coarse) == expected
    # And what one writes the other reads.
    path = written(coarse, tmp_path / 'a.safetensors')
    assert_same(load(segmentor(name, None), path), coarse)
    assert_same(load(coarse, path), load(exact, path))


def test_position_tables_of_another_size(tmp_path):
    source = trunk_file(tmp_path, 'vit')
    big = dict(trunk=dict(img_size=96))
    model = trained('vit', source, **big)
    path = written(model, tmp_path / 'a.safetensors')
    assert_same(load(segmentor('vit', None, **big), path), model)
    with pytest.raises(CheckpointError) as error:
        load(segmentor('vit', None), path)
    assert 'another size of pictures or windows' in str(error.value)


def test_nothing_is_read_where_the_trunk_is_there(mit, monkeypatch):
    model, path, source = mit
    other = segmentor('mit', source)
    other.init_weights()
    read = count_reads(monkeypatch)
    assert_same(load(other, path), model)
    assert read == []
    assert other.backbone.trunk_address == str(source)


def test_another_trunk_gives_way(mit, tmp_path):
    model, path, source = mit
    other = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
    assert_same(load(other, path), model)
    assert other.backbone.trunk_address == str(source)


def test_the_fingerprint_is_that_of_the_file(mit):
    model, _, source = mit
    found = load_file(source)
    trunk = {key: found[key] for key in model.backbone.trunk_state()}
    record = trunk_records(model)['backbone.']
    assert record.fingerprint == fingerprint(trunk)


def test_what_a_trunk_is_not_of_is_refused(mit, tmp_path):
    model, path, source = mit
    shutil.copy(trunk_file(tmp_path, 'mit', seed=1), source)
    other = segmentor('mit', None)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load(other, path)
    text = str(error.value)
    wanted = trunk_records(model)['backbone.'].fingerprint[:16]
    found = load_file(source)
    came = fingerprint({k: found[k] for k in model.backbone.trunk_state()})
    assert f'{path} needs the trunk with the fingerprint {wanted}' in text
    assert f'{came[:16]}: {source}, a file that has changed since' in text
    assert 'The likely cause is another checkpoint in `init_cfg`' in text
    assert 'set `model.backbone.init_cfg.checkpoint` to it' in text
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert other.backbone.trunk_source is None


def test_a_source_that_is_gone(mit, tmp_path):
    _, path, source = mit
    source.unlink()
    with pytest.raises(CheckpointError) as error:
        load(segmentor('mit', None), path)
    text = str(error.value)
    assert f'{source} does not exist' in text
    assert 'was moved or changed. Put the file of the trunk where' in text


def test_a_source_that_moved_is_found_by_init_cfg(mit, tmp_path):
    model, path, source = mit
    moved = source.rename(tmp_path / 'moved.safetensors')
    other = load(segmentor('mit', moved), path)
    assert_same(other, model)
    assert other.backbone.trunk_address == str(moved)


def test_a_source_that_moved_is_found_beside_the_file(mit, tmp_path):
    model, path, source = mit
    (tmp_path / 'new').mkdir()
    for file in (path, source):
        file.rename(tmp_path / 'new' / file.name)
    other = load(segmentor('mit', None), tmp_path / 'new' / path.name)
    assert_same(other, model)


def test_init_cfg_of_another_trunk_is_refused(mit, tmp_path):
    _, path, source = mit
    source.unlink()
    other = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
    mine = trunk_records(other)['backbone.'].fingerprint[:16]
    with pytest.raises(CheckpointError) as error:
        load(other, path)
    assert f'{mine}: {other.backbone.trunk_source}' in str(error.value)


def test_a_whole_model_as_the_source(mit, tmp_path):
    """A trunk's checkpoint that holds a side path, norms and heads too."""
    model, _, _ = mit
    whole = tmp_path / 'whole.safetensors'
    save_file(model.state_dict(), whole)
    other = segmentor('mit', None)
    other.load_state_dict(model.state_dict())
    path = tmp_path / 'b.safetensors'
    records = trunk_records(other, {'backbone.': str(whole)})
    adapter_of(other, records).write(path)
    assert_same(load(segmentor('mit', None), path), model)


def test_an_address_outlives_a_resume_and_not_another_trunk(mit, tmp_path):
    model, _, source = mit
    backbone = model.backbone
    backbone.load_state_dict(backbone.state_dict())
    assert backbone.trunk_source == 'the checkpoint'
    assert backbone.trunk_address == str(source)
    other = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
    backbone.load_state_dict(other.backbone.state_dict())
    assert backbone.trunk_address is None


def test_init_cfg_takes_an_adapter_file(mit):
    model, path, source = mit
    other = segmentor('mit', path)
    other.init_weights()
    assert_same(other.backbone, model.backbone)
    assert other.backbone.trunk_address == str(source)


def test_torch_loads_it_too(mit):
    model, path, _ = mit
    other = segmentor('mit', None)
    other.load_state_dict(read_checkpoint(path)['state_dict'], strict=True)
    assert_same(other, model)


def test_several_backbones(tmp_path):
    def both(*sources):
        models = map(segmentor, ('mit', 'vit'), sources)
        return nn.ModuleDict(dict(zip(('a', 'b'), models, strict=True)))

    model = both(trunk_file(tmp_path, 'mit'), trunk_file(tmp_path, 'vit'))
    for each in model.values():
        each.init_weights()
        awake(each.backbone)
    path = written(model, tmp_path / 'a.safetensors')
    assert set(read_adapter(path).trunks) == {'a.backbone.', 'b.backbone.'}
    assert_same(load(both(None, None), path), model)
    found = read_adapter(path)
    gone = next(k for k in found.tensors if k.startswith('b.backbone.side_'))
    del found.tensors[gone]
    found.write(path)
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        load(both(None, None), path)


def test_an_address_is_taken_over_with_the_same_trunk(mit):
    model, path, source = mit
    other = segmentor('mit', None)
    other.load_state_dict(model.state_dict())
    assert other.backbone.trunk_address is None
    load(other, path)
    assert other.backbone.trunk_address == str(source)
