"""Why a framework could not build a data set."""

import json
import re

import pytest
from mmengine.config import Config

from e3va_mm.errors import ConfigError, DataError
from e3va_mm.preflight import explain_data_failure
from e3va_mm.preflight.building import coco_fault
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)

OPTION = 'train_dataloader.dataset'


@pytest.fixture
def detection(tmp_path):
    for name in ('train', 'val'):
        make_coco(tmp_path, name, 3)
    return Config.fromfile(detection_config(tmp_path))


def explained(config, error=DataError):
    with pytest.raises(error) as raised:
        explain_data_failure(config, ('train',), RuntimeError('first'))
    assert str(raised.value.__cause__) == 'first'
    return str(raised.value)


def one(name, **changes):
    return lambda content: content[name][1].update(changes)


UNREADABLE = {
    'two numbers': (one('annotations', bbox=[1, 2]), 'bbox=[1, 2] at annot'),
    'texts': (
        one('annotations', bbox=[*'abcd']),
        "bbox=['a', 'b', 'c', 'd'] at annotations[1] (id 1); expected four",
    ),
    'a text for an area': (one('annotations', area='a'), "area='a' at annot"),
    'an id twice': (
        one('annotations', id=0),
        'has several annotations with the id 0',
    ),
    'a height in words': (
        one('images', height='a'),
        "height='a' at images[1] (id 1); expected a number above zero",
    ),
    'no file': (
        one('images', file_name=None),
        'file_name=None at images[1] (id 1); expected a text',
    ),
    'no area': (
        lambda content: content['annotations'][1].pop('area'),
        "lacks the key 'area' at annotations[1]",
    ),
    'no categories': (
        lambda content: content.pop('categories'),
        "has no list 'categories'",
    ),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_entries_that_mmdet_cannot_read(detection, tmp_path, name):
    change, fault = UNREADABLE[name]
    path = tmp_path / 'train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    text = explained(detection)
    assert text.startswith(f'{OPTION}.ann_file: {path} ')
    assert fault in text
    assert text.endswith(
        '\nCopy the file again, or correct it and write it again.'
    )


@pytest.mark.parametrize('content', [b'{"images": [', b'\xff\xfe\x00'])
def test_what_is_no_json(detection, tmp_path, content):
    path = tmp_path / 'train.json'
    path.write_bytes(content)
    text = f'{OPTION}.ann_file: {path} is not valid JSON: '
    assert text in explained(detection)


def test_contents_of_other_kinds(tmp_path):
    make_coco(tmp_path, 'train', 2, masks=True)
    content = json.loads((tmp_path / 'train.json').read_text())
    assert coco_fault(content) is None
    # A reader that needs no area, which failed over something else.
    del content['annotations'][0]['area']
    assert coco_fault(content) is None
    assert coco_fault([1])[0] == 'holds a list'
    assert coco_fault({**content, 'images': {}})[0] == "has no list 'images'"
    assert coco_fault({**content, 'images': [3]})[0] == 'has 3 at images[0]'


def test_files_that_are_not_there(detection, tmp_path):
    (tmp_path / 'train.json').unlink()
    text = explained(detection)
    assert f'{OPTION}: no such file or folder: {tmp_path}/train.json' in text
    # Data that was not asked for is not looked at.
    explain_data_failure(detection, ('val', 'test'), RuntimeError())

    make_segmentation(tmp_path)
    config = Config.fromfile(segmentation_config(tmp_path))
    config.train_dataloader.dataset.data_prefix.img_path = 'nowhere'
    text = explained(config)
    assert f'{OPTION}: no such file or folder: {tmp_path}/nowhere' in text
    config.train_dataloader.dataset.ann_file = 'names.txt'
    text = explained(config)
    assert f'{OPTION}.ann_file: no such file: {tmp_path}/names.txt' in text


def test_classes_of_another_data_set(detection, tmp_path):
    """mmengine cannot serialise a data set without images."""
    inner = detection.train_dataloader.dataset
    inner.metainfo = dict(classes=('fox', 'owl'))
    wrapped = dict(type='ConcatDataset', datasets=[inner])
    detection.train_dataloader.dataset = wrapped
    text = explained(detection)
    assert text.startswith(f'{OPTION}.datasets.0.ann_file: {tmp_path}')
    assert 'no category for 2 of 2 classes' in text
    assert re.search(r'datasets\.0: the data set is empty', text)
    inner.metainfo = dict(classes='cat')
    text = explained(detection, ConfigError)
    assert "classes=('cat', ), with a comma" in text


def test_what_the_data_does_not_explain(detection):
    explain_data_failure(detection, ('train', 'val', 'test'), RuntimeError())
    detection.train_dataloader.dataset.type = 'NoSuchDataset'
    explain_data_failure(detection, ('train',), RuntimeError())
