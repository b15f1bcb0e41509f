"""Odd images and annotations train a step, or are refused by their name."""

import json
import math

import numpy as np
import pytest
from mmengine.logging import MessageHub
from PIL import Image

from e3va_mm.commands import train
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def write(pixels, path, form, mode=None):
    """An image of a form under a name that may say another."""
    image = Image.fromarray(pixels)
    if mode:
        image = image.convert(mode)
    with path.open('wb') as file:
        image.save(file, form)


ODD_IMAGES = {
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


def finite():
    """Whether each loss of the newest run is finite."""
    hub = MessageHub.get_current_instance()
    return [
        math.isfinite(each) for each in hub.get_scalar('train/loss').data[0]
    ]


def run(config, *options):
    """Train without validation; the exit code."""
    return train.main(
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


CHECK = [dict(type='e3va_mm.DatasetCheckHook')]


def detection(folder, count=4, change=None, **kwargs):
    make_coco(folder, 'train', count)
    if change is not None:
        path = folder / 'train.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return detection_config(folder, **{'custom_hooks': CHECK, **kwargs})


def segmentation(folder, count=4, **kwargs):
    make_segmentation(folder, count)
    return segmentation_config(folder, **{'custom_hooks': CHECK, **kwargs})


# -- images ----------------------------------------------------------------


def test_odd_images_of_a_detector(tmp_path):
    config = detection(tmp_path, len(ODD_IMAGES))
    for i, make in enumerate(ODD_IMAGES.values()):
        make(tmp_path / 'train' / f'{i:03}.jpg')
    batch = f'train_dataloader.batch_size={len(ODD_IMAGES)}'
    assert run(config, batch) == 0
    assert finite() == [True]


def test_odd_images_of_a_segmentor(tmp_path):
    config = segmentation(tmp_path, len(ODD_IMAGES))
    for i, make in enumerate(ODD_IMAGES.values()):
        make(tmp_path / 'images' / f'{i:03}.jpg')
    batch = f'train_dataloader.batch_size={len(ODD_IMAGES)}'
    assert run(config, batch) == 0
    assert finite() == [True] * 2


@pytest.mark.parametrize('size', [(48, 1), (1, 64), (1, 1)])
def test_an_image_one_pixel_wide_is_named(tmp_path, capsys, size):
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
    assert '.jpg: the image has 1 x 48 pixels; expected a whole image' in text


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['mmdet', 'mmseg'])
def test_an_image_that_breaks_while_training(tmp_path, capsys, kind, workers):
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
    assert text.startswith(f'{path}: cannot be decoded, ')
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
        del content['annotations'][-3]  # an image without any

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
    assert 'train_dataloader.dataset: the data set is empty' in text
    assert 'train.json' in text


BAD_MAPS = {
    'beyond the classes': (
        noise(48, 64, high=3) + 75,
        'values that no class has: 75, 76, 77; expected 0 to 2 for the 3 '
        'classes and [255] for none',
    ),
    'the next class': (
        noise(48, 64, high=4),
        'values that no class has: 3; expected',
    ),
    '16 bits': (
        np.full((48, 64), 300, dtype=np.uint16),
        'values that no class has: 44;',
    ),
    'colours': (
        noise(48, 64, 3),
        'the map has the shape (48, 64, 3); expected (48, 64)',
    ),
}


@pytest.mark.parametrize('name', BAD_MAPS)
def test_values_that_no_class_has(tmp_path, capsys, name):
    config = segmentation(tmp_path)
    pixels, fault = BAD_MAPS[name]
    path = tmp_path / 'maps' / '001.png'
    write(pixels, path, 'PNG')
    text = refusal(capsys, config, 'train_dataloader.batch_size=4')
    assert text.startswith(f'train_dataloader.dataset: {path}: ')
    assert fault in text


def test_maps_of_nothing_and_of_colour_tables_train(tmp_path):
    config = segmentation(tmp_path)
    write(np.full((48, 64), 255, np.uint8), tmp_path / 'maps/000.png', 'PNG')
    write(np.zeros((48, 64), np.uint8), tmp_path / 'maps/001.png', 'PNG', 'P')
    assert run(config, 'train_dataloader.batch_size=4') == 0
    assert finite() == [True] * 2
