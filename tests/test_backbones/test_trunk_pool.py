"""Adapter files find their trunk in memory."""

import pytest
import torch

from e3va_mm.backbones import TunedBackbone, trunk_pool
from e3va_mm.backbones.trunk_pool import TrunkPool
from e3va_mm.errors import CheckpointError
from e3va_mm.weights import adapter_of, trunk_records
from tests.adapted_models import segmentor, trained, trunk_file
from tests.trunk_cases import image_for

NAME = 'swin of mmdet'
WEIGHT = 'stages.0.blocks.0.ffn.layers.1.weight'


@pytest.fixture
def source(tmp_path):
    return trunk_file(tmp_path, NAME)


def pool_of(*models):
    pool = TrunkPool()
    for model in models:
        pool.add(model.backbone)
    return pool


def load(model, state, pool):
    """What an adapter file is read as, loaded while a pool is open."""
    with pool.open():
        model.load_state_dict(dict(state))
    return model.backbone


def state_of(model, tmp_path):
    adapter = adapter_of(model, trunk_records(model))
    return adapter.checkpoint(tmp_path / 'a.safetensors')['state_dict']


@pytest.mark.parametrize('stored', [None, 'bf16'])
def test_a_pool_that_is_open_gives_the_trunk(stored, source, tmp_path):
    model = trained(NAME, source, trunk_weights=stored)
    state = state_of(model, tmp_path)
    source.unlink()  # now there is but the pool
    later = segmentor(NAME, None, trunk_weights=stored).eval()
    with pytest.raises(CheckpointError, match='needs the trunk'):
        later.load_state_dict(dict(state))
    ours = load(later, state, pool_of(model))
    assert ours.storage is model.backbone.storage
    assert ours.trunk_address == str(source)
    # It stays stored, as it may not fit into memory as it came.
    weight = ours.get_parameter(WEIGHT)
    assert weight is model.backbone.get_parameter(WEIGHT)
    assert weight.dtype == (torch.bfloat16 if stored else torch.float32)
    image = image_for(NAME)
    for one, other in zip(ours(image), model.backbone(image), strict=True):
        assert torch.equal(one, other)
    # In files as it came, once for both.
    states = [each.backbone.state_dict() for each in (model, later)]
    assert states[0][WEIGHT].dtype == torch.float32
    assert states[0][WEIGHT].data_ptr() == states[1][WEIGHT].data_ptr()


def test_another_trunk_is_left_alone(source, tmp_path, monkeypatch):
    state = state_of(trained(NAME, source), tmp_path)
    pool = pool_of(trained(NAME, trunk_file(tmp_path, NAME, seed=1)))
    lines = []
    monkeypatch.setattr(
        trunk_pool, 'print_log', lambda line, **kwargs: lines.append(line)
    )
    assert load(segmentor(NAME, None), state, pool).trunk_source is not None
    assert not lines
    # The same weights under other options.
    pool.add(trained(NAME, source, trunk_compute='bf16').backbone)
    load(segmentor(NAME, None), state, pool)
    assert 'cannot be shared: trunk_compute is bf16 in one' in lines[0]


def test_a_trunk_goes_with_its_last_backbone(source, tmp_path, monkeypatch):
    one, other = (trained(NAME, source) for _ in range(2))
    state = state_of(one, tmp_path)
    pool = pool_of(one, other)
    # Whole checkpoints share what is equal.
    assert other.backbone.storage is one.backbone.storage
    sources = []
    reads = TunedBackbone._reads
    monkeypatch.setattr(
        TunedBackbone,
        '_reads',
        lambda self, source: sources.append(source) or reads(self, source),
    )
    for gone, reading in ((one, 0), (other, 1)):
        pool.remove(gone.backbone)
        load(segmentor(NAME, None), state, pool)
        assert len(sources) == reading
