"""Odd pictures and annotations train a step, or are refused by their name."""

import json
import math

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub
from PIL import Image

from e3va_mm.commands import launch
from e3va_mm.errors import DataError
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    truncate,
)


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def write(pixels, path, form, mode=None):
    """A picture of a form under a name that may say another."""
    picture = Image.fromarray(pixels)
    if mode:
        picture = picture.convert(mode)
    with path.open('wb') as file:
        picture.save(file, form)


ODD_PICTURES = {
    'grey': lambda path: write(noise(48, 64), path, 'JPEG'),
    '16 bits': lambda path: write(
        noise(48, 64, high=2**16, dtype=np.uint16), path, 'PNG'
    ),
    'CMYK': lambda path: write(noise(48, 64, 3), path, 'JPEG', 'CMYK'),
    'RGBA': lambda path: write(noise(48, 64, 4), path, 'PNG'),
    'palette': lambda path: write(noise(48, 64), path, 'PNG', 'P'),
    'black and white': lambda path: write(noise(48, 64), path, 'PNG', '1'),
    'GIF': lambda path: write(noise(48, 64), path, 'GIF', 'P'),
}
BAD_PICTURES = {
    'truncated': (lambda path: truncate(path, 0.4), 'cannot be decoded'),
    'zero bytes': (lambda path: path.write_bytes(b''), 'empty'),
    'text': (
        lambda path: path.write_text('<html>'),
        'cannot be decoded, cannot identify image file',
    ),
    'header alone': (lambda path: truncate(path, 0.05), 'cannot be decoded'),
    'a folder': (
        lambda path: (path.unlink(), path.mkdir()),
        'cannot be read, Is a directory',
    ),
}


def finite():
    """Whether each loss of the newest run is finite."""
    hub = MessageHub.get_current_instance()
    return [
        math.isfinite(each) for each in hub.get_scalar('train/loss').data[0]
    ]


def run(config, *options):
    """Train without validation; the exit code."""
    return launch.train(
        [
            str(config),
            '--cfg-options',
            *('val_dataloader=None', 'val_cfg=None', 'val_evaluator=None'),
            *options,
        ]
    )


def refusal(capsys, config, *options):
    assert run(config, *options) == 1
    _, _, text = capsys.readouterr().err.rpartition('error: ')
    assert 'Traceback' not in text
    return text


def detection(folder, count=4, change=None, **kwargs):
    make_coco(folder, 'train', count)
    if change is not None:
        path = folder / 'train.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return detection_config(folder, **kwargs)


def segmentation(folder, count=4, **kwargs):
    make_segmentation(folder, count)
    return segmentation_config(folder, **kwargs)


# -- pictures ----------------------------------------------------------------


def test_odd_pictures_of_a_detector(tmp_path):
    config = detection(tmp_path, len(ODD_PICTURES))
    for i, make in enumerate(ODD_PICTURES.values()):
        make(tmp_path / 'train' / f'{i:03}.jpg')
    batch = f'train_dataloader.batch_size={len(ODD_PICTURES)}'
    assert run(config, batch) == 0
    assert finite() == [True]


def test_odd_pictures_of_a_segmentor(tmp_path):
    config = segmentation(tmp_path, len(ODD_PICTURES))
    for i, make in enumerate(ODD_PICTURES.values()):
        make(tmp_path / 'images' / f'{i:03}.jpg')
    batch = f'train_dataloader.batch_size={len(ODD_PICTURES)}'
    assert run(config, batch) == 0
    assert finite() == [True] * 2


def test_bad_pictures_are_all_named(tmp_path, capsys):
    config = detection(tmp_path, len(BAD_PICTURES) + 1)
    for i, (make, _) in enumerate(BAD_PICTURES.values()):
        make(tmp_path / 'train' / f'{i:03}.jpg')
    text = refusal(capsys, config)
    for i, (_, fault) in enumerate(BAD_PICTURES.values()):
        path = tmp_path / 'train' / f'{i:03}.jpg'
        assert f'  {path}: {fault}' in text
    assert f'{len(BAD_PICTURES)} of {len(BAD_PICTURES) + 1} files' in text


def test_a_missing_picture_is_named(tmp_path, capsys):
    config = detection(tmp_path)
    (tmp_path / 'train' / '002.jpg').unlink()
    text = refusal(capsys, config)
    assert text.startswith('1 of 4 files that the data names do not exist')
    assert str(tmp_path / 'train' / '002.jpg') in text


@pytest.mark.parametrize('size', [(48, 1), (1, 64), (1, 1)])
def test_a_picture_one_pixel_wide_is_named(tmp_path, capsys, size):
    """mmdet finds no anchor in it, or divides by nothing."""

    def change(content):
        content['images'][0].update(height=size[0], width=size[1])
        content['annotations'][0].update(bbox=[0, 0, size[1], size[0]])

    config = detection(tmp_path, change=change)
    write(noise(*size, 3), tmp_path / 'train' / '000.jpg', 'JPEG')
    code = run(config, 'train_dataloader.batch_size=4')
    text = capsys.readouterr().err
    if code == 0:
        assert finite() == [True]
    else:
        assert 'Traceback' not in text
        assert str(tmp_path / 'train' / '000.jpg') in text


def test_a_map_one_pixel_wide_is_named(tmp_path, capsys):
    """mmcv's reader takes it for a list."""
    config = segmentation(tmp_path, 2)
    for i in range(2):
        write(noise(48, 1, 3), tmp_path / f'images/{i:03}.jpg', 'JPEG')
        write(noise(48, 1, high=3), tmp_path / f'maps/{i:03}.png', 'PNG')
    text = refusal(capsys, config)
    assert '.jpg is 1 x 48 pixels. Copy the file again, or take' in text


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['mmdet', 'mmseg'])
def test_a_picture_that_breaks_while_training(tmp_path, capsys, kind, workers):
    """What the start does not see; the same in a worker."""
    hooks = [dict(type='e3va_mm.DatasetCheckHook', check_content=False)]
    if kind == 'mmdet':
        config = detection(tmp_path, custom_hooks=hooks)
        path = tmp_path / 'train' / '001.jpg'
    else:
        config = segmentation(tmp_path, custom_hooks=hooks)
        path = tmp_path / 'maps' / '001.png'
    path.write_bytes(b'\xff\xd8\xff nothing')
    text = refusal(
        capsys,
        config,
        'train_dataloader.batch_size=4',
        f'train_dataloader.num_workers={workers}',
    )
    assert text.startswith(
        f'train_dataloader.dataset: {path} cannot be decoded, '
    )
    assert text.endswith('or take it out of the data.\n')


# -- annotations -------------------------------------------------------------

BOXES = {
    'zero area': [8, 8, 0, 0],
    'zero width': [8, 8, 0, 20],
    'negative size': [8, 8, -24, -20],
    'outside': [100, 100, 24, 20],
    'half outside': [50, 40, 100, 100],
    'far larger': [-1e9, -1e9, 2e9, 2e9],
    'a speck': [8, 8, 1e-3, 1e-3],
    'NaN': [math.nan] * 4,
    'without end': [0, 0, math.inf, math.inf],
}


def test_odd_boxes_train(tmp_path):
    """mmdet drops what is outside or has no area, and clips the rest."""

    def change(content):
        for entry, box in zip(
            content['annotations'], BOXES.values(), strict=False
        ):
            entry['bbox'] = box
        content['annotations'][-1]['category_id'] = 77
        content['annotations'][-2]['iscrowd'] = 1
        del content['annotations'][-3]  # a picture without any

    count = len(BOXES) + 4
    config = detection(tmp_path, count, change)
    assert (
        run(
            config,
            f'train_dataloader.batch_size={count}',
            'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
        )
        == 0
    )
    assert finite() == [True]


def test_no_class_is_known(tmp_path, capsys):
    def change(content):
        for entry in content['annotations']:
            entry['category_id'] = 77

    text = refusal(capsys, detection(tmp_path, change=change))
    assert 'train_dataloader.dataset is empty' in text
    assert 'train.json' in text


def one(name, **changes):
    return lambda content: content[name][1].update(changes)


UNREADABLE = {
    'two numbers': (one('annotations', bbox=[1, 2]), 'bbox=[1, 2] at annot'),
    'no numbers': (one('annotations', bbox=[]), 'bbox=[] at annotations[1]'),
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
    'a list': (lambda content: [1], 'holds a list, not a dict of images'),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_entries_that_mmdet_cannot_read(tmp_path, name):
    change, fault = UNREADABLE[name]
    config = detection(tmp_path)
    path = tmp_path / 'train.json'
    content = json.loads(path.read_text())
    replaced = change(content)
    path.write_text(json.dumps(replaced or content))
    with pytest.raises(DataError) as error:
        launch.explain_data_failure(
            Config.fromfile(config), ('train',), RuntimeError()
        )
    text = str(error.value)
    assert text.startswith(f'train_dataloader.dataset.ann_file: {path} ')
    assert fault in text
    assert 'Correct it, or write the file again.' in text


# -- segmentation maps -------------------------------------------------------


def test_a_map_of_another_size_is_named_before_the_first_step(
    tmp_path, capsys
):
    config = segmentation(tmp_path)
    path = tmp_path / 'maps' / '002.png'
    write(noise(20, 30, high=3), path, 'PNG')
    text = refusal(capsys, config)
    assert text.startswith('1 of 4 segmentation maps have another size')
    picture = tmp_path / 'images' / '002.jpg'
    assert f'  {path}: (30, 20) beside (64, 48) of {picture}' in text


def test_a_picture_that_its_reader_turns_fits_its_map(tmp_path):
    config = segmentation(tmp_path, 2)
    for i in range(2):
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(noise(64, 48, 3)).save(
            tmp_path / f'images/{i:03}.jpg', exif=exif
        )
    assert run(config) == 0


BAD_MAPS = {
    'beyond the classes': (
        noise(48, 64, high=3) + 75,
        'values that no class has: 75, 76, 77. There are 3 classes, 0 to 2, '
        'and [255] for none',
    ),
    'the next class': (
        noise(48, 64, high=4),
        'values that no class has: 3. There',
    ),
    '16 bits': (
        np.full((48, 64), 300, dtype=np.uint16),
        'values that no class has: 44.',
    ),
    'colours': (
        noise(48, 64, 3),
        'has the shape (48, 64, 3) beside a picture of (48, 64)',
    ),
}


@pytest.mark.parametrize('name', BAD_MAPS)
def test_values_that_no_class_has(tmp_path, capsys, name):
    config = segmentation(tmp_path)
    pixels, fault = BAD_MAPS[name]
    path = tmp_path / 'maps' / '001.png'
    write(pixels, path, 'PNG')
    text = refusal(capsys, config, 'train_dataloader.batch_size=4')
    assert text.startswith(f'train_dataloader.dataset: the map {path} ')
    assert fault in text


def test_maps_of_nothing_and_of_colour_tables_train(tmp_path):
    config = segmentation(tmp_path)
    write(np.full((48, 64), 255, np.uint8), tmp_path / 'maps/000.png', 'PNG')
    write(np.zeros((48, 64), np.uint8), tmp_path / 'maps/001.png', 'PNG', 'P')
    assert run(config, 'train_dataloader.batch_size=4') == 0
    assert finite() == [True] * 2
