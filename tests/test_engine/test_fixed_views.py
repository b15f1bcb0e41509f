"""Views are drawn once, whoever asks for them, and used in turn."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from e3va_mm.engine import fixed_views
from e3va_mm.engine.fixed_views import FixedViews
from e3va_mm.errors import ConfigError
from e3va_mm.registry import DATASETS, install
from tests.test_engine.test_hooks.tiny import detection_config, make_coco


class Draws(Dataset):
    """Samples of numbers from all generators."""

    metainfo = dict(classes=('cat',))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        drawn = random.random(), np.random.rand(), torch.rand(()).item()
        return torch.tensor([index, *drawn], dtype=torch.double)


def state():
    return (random.random(), np.random.rand(), torch.rand(()).item())


def test_views_come_from_their_numbers_alone():
    data = FixedViews(Draws(), views=2)
    known = [data.view(i, v) for i in range(3) for v in range(2)]
    assert len({tuple(view[1:].tolist()) for view in known}) == 6
    assert len({value.item() for view in known for value in view[1:]}) == 18
    state()
    assert torch.equal(data.view(2, 1), known[5])
    assert not torch.equal(FixedViews(Draws(), 2, seed=1).view(2, 1), known[5])
    assert (len(data), data.metainfo) == (3, Draws.metainfo)


def test_other_draws_go_on_as_without():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = state()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    FixedViews(Draws(), views=2)[1]
    assert state() == expected


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_gives_its_views_in_turn(workers):
    """Whichever worker has it; epochs begin new workers."""
    data = FixedViews(Draws(), views=2)
    loader = DataLoader(data, num_workers=workers)
    for epoch in range(3):
        for index, (sample,) in enumerate(loader):
            assert torch.equal(sample, data.view(index, epoch % 2))


def test_processes_begin_with_views_of_their_own(monkeypatch):
    """An image moves from one to another between epochs."""
    monkeypatch.setattr(fixed_views, 'get_rank', lambda: 3)
    data = FixedViews(Draws(), views=2)
    for turn in range(3):
        assert torch.equal(data[1], data.view(1, (3 + turn) % 2))


def test_without_a_number_nothing_is_fixed():
    data = FixedViews(Draws())
    assert not torch.equal(data[0], data[0])
    for views in (0, True, '2'):
        with pytest.raises(ConfigError, match='a whole number from 1 on'):
            FixedViews(Draws(), views=views)


def test_boxes_go_with_the_pixels(tmp_path):
    """Of a detector's pipeline, by its config."""
    install()
    make_coco(tmp_path, 'train')
    config = Config.fromfile(detection_config(tmp_path))
    dataset = config.train_dataloader.dataset
    dataset.pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
    with DefaultScope.overwrite_default_scope('mmdet'):
        data = DATASETS.build(
            dict(type='e3va_mm.FixedViews', dataset=dataset, views=8)
        )
    assert data.get_data_info(1)['img_id'] == 1
    seen = {}
    for view in range(8):
        sample = data.view(0, view)
        found = sample['data_samples']
        (box,) = found.gt_instances.bboxes.tensor.tolist()
        seen[found.flip] = sample['inputs'], box
        again = data.view(0, view)
        assert torch.equal(again['inputs'], sample['inputs'])
        assert again['data_samples'].gt_instances.bboxes.tensor.tolist() == [
            box
        ]
    plain, flipped = seen[False], seen[True]
    assert torch.equal(plain[0].flip(-1), flipped[0])
    assert flipped[1][0] == pytest.approx(64 - plain[1][2])
