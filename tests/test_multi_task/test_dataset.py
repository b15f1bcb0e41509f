"""Samples of several tasks side by side."""

import pytest

from e3va_mm.registry import DATASETS
from tests.test_engine.test_hooks.tiny import (
    CLASSES,
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('several')
    make_coco(folder, 'train', count=3)
    make_segmentation(folder, count=2)
    tasks = dict(
        boxes=detection_config(folder), parts=segmentation_config(folder)
    )
    return DATASETS.build(dict(type='e3va_mm.MultiTaskDataset', tasks=tasks))


def test_the_shorter_one_begins_again(dataset):
    dataset.full_init()
    assert len(dataset) == 3
    paths = [
        [dataset[index][task]['data_samples'].img_path for index in range(3)]
        for task in ('boxes', 'parts')
    ]
    assert len(set(paths[0])) == 3
    assert paths[1][2] == paths[1][0] != paths[1][1]


def test_what_it_says_of_itself(dataset):
    assert dataset.metainfo['boxes']['classes'] == CLASSES
    assert dataset.metainfo['parts']['classes'] == CLASSES
