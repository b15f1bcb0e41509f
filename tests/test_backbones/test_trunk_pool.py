"""Adapter files find their trunk in memory."""

import pytest
import torch

from e3va_mm.backbones import TunedBackbone
from e3va_mm.backbones.trunk_pool import TrunkPool
from e3va_mm.errors import CheckpointError
from e3va_mm.weights import adapter_of, trunk_records
from tests.adapted_models import segmentor, trained, trunk_file
from tests.trunk_cases import image_for

NAME = 'swin of mmdet'


@pytest.fixture
def source(tmp_path):
    return trunk_file(tmp_path, NAME)


def checkpoint(model, path):
    """What an adapter file of a model is read as."""
    adapter = adapter_of(model, trunk_records(model))
    return adapter.checkpoint(path)['state_dict']


def test_a_pool_that_is_open_gives_the_trunk(source, tmp_path):
    model = trained(NAME, source)
    state = checkpoint(model, tmp_path / 'adapter.safetensors')
    pool = TrunkPool()
    pool.add(model.backbone)
    source.unlink()  # now there is but the pool
    later = segmentor(NAME, None)
    with pytest.raises(CheckpointError, match='needs the trunk'):
        later.load_state_dict(dict(state))
    with pool.open():
        later.load_state_dict(dict(state))
    assert later.backbone.storage is model.backbone.storage
    assert later.backbone.trunk_address == str(source)


def test_another_trunk_is_left_alone(source, tmp_path, monkeypatch):
    model = trained(NAME, source)
    state = checkpoint(model, tmp_path / 'adapter.safetensors')
    pool = TrunkPool()
    pool.add(trained(NAME, trunk_file(tmp_path, NAME, seed=1)).backbone)
    lines = []
    monkeypatch.setattr(
        'e3va_mm.backbones.trunk_pool.print_log',
        lambda line, **kwargs: lines.append(line),
    )
    later = segmentor(NAME, None)
    with pool.open():
        later.load_state_dict(dict(state))
    assert later.backbone.trunk_source is not None
    assert not lines
    # The same weights under other options.
    pool.add(trained(NAME, source, trunk_compute='bf16').backbone)
    later = segmentor(NAME, None)
    with pool.open():
        later.load_state_dict(dict(state))
    assert 'cannot be shared: trunk_compute is bf16 in one' in lines[0]


def test_a_trunk_that_is_stored_stays_so(source, tmp_path):
    """It may not fit into memory as it came."""
    stored = dict(trunk_weights='bf16')
    model = trained(NAME, source, **stored)
    state = checkpoint(model, tmp_path / 'adapter.safetensors')
    pool = TrunkPool()
    pool.add(model.backbone)
    image = image_for(NAME)
    before = model.backbone(image)
    later = segmentor(NAME, None, **stored).eval()
    with pool.open():
        later.load_state_dict(dict(state))
    weight = 'stages.0.blocks.0.ffn.layers.1.weight'
    assert later.backbone.storage.stored
    assert later.backbone.get_parameter(weight).dtype == torch.bfloat16
    for ours, theirs in zip(later.backbone(image), before, strict=True):
        assert torch.equal(ours, theirs)
    # As they came, once for both.
    states = [each.backbone.state_dict() for each in (model, later)]
    assert states[0][weight] is states[1][weight]
    assert states[0][weight].dtype == torch.float32


def test_whole_checkpoints_share_what_is_equal(source):
    one, other = trained(NAME, source), trained(NAME, source)
    pool = TrunkPool()
    pool.add(one.backbone)
    pool.add(other.backbone)
    assert other.backbone.storage is one.backbone.storage


def test_a_trunk_goes_with_its_last_backbone(source, tmp_path, monkeypatch):
    one, other = (trained(NAME, source) for _ in range(2))
    state = checkpoint(one, tmp_path / 'adapter.safetensors')
    pool = TrunkPool()
    for model in (one, other):
        pool.add(model.backbone)
    sources = []
    reads = TunedBackbone._reads
    monkeypatch.setattr(
        TunedBackbone,
        '_reads',
        lambda self, source: sources.append(source) or reads(self, source),
    )
    for gone, reading in ((one, 0), (other, 1)):
        pool.remove(gone.backbone)
        with pool.open():
            segmentor(NAME, None).load_state_dict(dict(state))
        assert len(sources) == reading
