"""Labels, masks, maps and sizes: what is wrong is named, the rest passes."""

import json

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from e3va_mm.preflight.checks import opened, run_checks
from tests.test_engine.test_hooks.tiny import (
    CLASSES,
    make_coco,
    make_segmentation,
)

TRAIN = 'train_dataloader.dataset'


def problems_of(config, *modes):
    """What the checks find in a config whose data sets are built."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        loaded = {
            f'{mode}_dataloader': DATASETS.build(
                config[f'{mode}_dataloader'].dataset
            )
            for mode in modes or ('train',)
        }
    return run_checks(config, opened(loaded))


def only(config, check, *modes):
    (problem,) = problems_of(config, *modes)
    assert problem.check == check
    return problem


@pytest.fixture
def detection(tmp_path):
    for mode in ('train', 'val'):
        make_coco(tmp_path, mode, masks=True)
    config = dict(default_scope='mmdet', model=dict())
    for mode, folder in dict(train='train', val='val', test='val').items():
        config[f'{mode}_dataloader'] = dict(
            batch_size=1,
            dataset=dict(
                type='CocoDataset',
                data_root=str(tmp_path),
                ann_file=f'{folder}.json',
                data_prefix=dict(img=f'{folder}/'),
                metainfo=dict(classes=CLASSES),
                test_mode=mode != 'train',
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', with_bbox=True),
                ],
            ),
        )
    file = str(tmp_path / 'val.json')
    config['val_evaluator'] = dict(type='CocoMetric', ann_file=file)
    return Config(config)


@pytest.fixture
def segmentation(tmp_path):
    make_segmentation(tmp_path)
    head = dict(type='FCNHead', num_classes=len(CLASSES))
    config = dict(default_scope='mmseg', model=dict(decode_head=head))
    for mode in ('train', 'val'):
        config[f'{mode}_dataloader'] = dict(
            batch_size=1,
            dataset=dict(
                type='BaseSegDataset',
                data_root=str(tmp_path),
                data_prefix=dict(img_path='images', seg_map_path='maps'),
                metainfo=dict(classes=CLASSES),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations'),
                    dict(type='PackSegInputs'),
                ],
            ),
        )
    config['val_evaluator'] = dict(type='IoUMetric')
    return Config(config)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_right_passes(detection, segmentation):
    assert problems_of(detection, 'train', 'val') == []
    assert problems_of(segmentation, 'train', 'val') == []


# ---- masks

RLE = dict(counts='a', size=[48, 64])
MASKS = {
    'missing': (None, 'is missing or empty', 'error'),
    'empty': ([], 'is missing or empty', 'error'),
    'flat': ([1, 2, 3, 2, 3, 4], 'is a flat list', 'error'),
    'text': ('abc', 'is of type str', 'error'),
    'size': (dict(RLE, size=[64, 48]), 'is an RLE of the size', 'error'),
    'points': ([[1, 2, 3, 4]], 'has no polygon of three', 'warning'),
    'keys': (dict(size=[48, 64]), "has the keys ['size']", 'warning'),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks_that_cannot_be_loaded(detection, tmp_path, name):
    mask, text, severity = MASKS[name]
    rewrite(
        tmp_path / 'train.json',
        lambda content: content['annotations'][1].update(segmentation=mask),
    )
    dataset = detection.train_dataloader.dataset
    assert problems_of(detection) == []  # for boxes that is no matter
    dataset.pipeline[1].with_mask = True
    problem = only(detection, 'masks')
    assert problem.where == f'{tmp_path}/train.json'
    assert f'annotation 1 (image 1) {text}' in problem.found
    assert problem.severity == severity
    assert 'with_mask=False' in problem.advice


def test_masks_of_every_form_pass(detection, tmp_path):
    def change(content):
        content['annotations'][0]['segmentation'] = RLE
        content['annotations'][1]['segmentation'] = dict(
            RLE, counts=[0, 48 * 64]
        )

    rewrite(tmp_path / 'train.json', change)
    detection.train_dataloader.dataset.pipeline[1].with_mask = True
    assert problems_of(detection) == []


def test_masks_of_panoptic_maps_are_in_no_instance(tmp_path):
    from mmdet.datasets import CocoPanopticDataset

    make_coco(tmp_path, 'train', 1)
    content = json.loads((tmp_path / 'train.json').read_text())
    for each in content['categories']:
        each['isthing'] = 1
    thing = dict(id=1, category_id=1, bbox=[8, 8, 16, 16], area=9, iscrowd=0)
    content['annotations'] = [
        dict(image_id=0, file_name='000.png', segments_info=[thing])
    ]
    (tmp_path / 'train.json').write_text(json.dumps(content))
    dataset = CocoPanopticDataset(
        data_root=str(tmp_path),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(
            classes=CLASSES, thing_classes=CLASSES, stuff_classes=()
        ),
        pipeline=[dict(type='mmdet.LoadAnnotations', with_mask=True)],
    )
    assert dataset.get_data_info(0)['instances']
    assert run_checks(Config(), opened(dict(train_dataloader=dataset))) == []


# ---- sizes


def test_sizes_that_annotations_do_not_have(detection, tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    path = tmp_path / 'train' / '001.jpg'
    image = Image.open(path)
    image.resize((32, 24)).save(tmp_path / 'train' / '000.jpg')
    image.save(path, exif=turned)
    small, upright = problems_of(detection)
    assert small.check == upright.check == 'image_sizes'
    assert str(small) == (
        f'{tmp_path}/train/000.jpg: the image has 32 x 24 pixels; expected '
        f'64 x 48 as {tmp_path}/train.json says.'
    )
    assert '48 x 64 pixels after its EXIF orientation 6' in upright.found
    # Read as it is stored, it fits.
    load = detection.train_dataloader.dataset.pipeline[0]
    load.color_type = 'color_ignore_orientation'
    assert problems_of(detection) == [small]


# ---- labels


def test_classes_without_a_sample(detection, tmp_path):
    rewrite(
        tmp_path / 'train.json',
        lambda content: content['annotations'].pop(2),
    )
    problem = only(detection, 'labels')
    assert problem.severity == 'warning'
    assert problem.found == "no sample has the class 'bird'"
    # Another data set that is joined with it has some.
    inner = detection.train_dataloader.dataset
    other = dict(inner, ann_file='val.json', data_prefix=dict(img='val/'))
    joined = dict(type='ConcatDataset', datasets=[inner, other])
    detection.train_dataloader.dataset = joined
    assert problems_of(detection) == []


def test_no_label_at_all(detection, tmp_path):
    rewrite(tmp_path / 'train.json', lambda c: c.update(annotations=[]))
    detection.train_dataloader.dataset.filter_cfg = None
    problem = only(detection, 'labels')
    assert problem.severity == 'error'
    detection.test_dataloader.dataset = detection.train_dataloader.dataset
    detection.test_evaluator = dict(type='CocoMetric', format_only=True)
    found = problems_of(detection, 'test')
    assert [each.severity for each in found] == ['warning']


@pytest.mark.parametrize(
    'values, options, text',
    [
        ((0, 255), {}, 'The maps hold 0, 255 after reduce_zero_label=False'),
        ((0, 1, 2), dict(reduce_zero_label=True), 'The maps hold 0, 1, 255'),
    ],
)
def test_maps_without_a_class(segmentation, tmp_path, values, options, text):
    pixels = np.resize(np.array(values, np.uint8), (48, 64))
    for path in (tmp_path / 'maps').iterdir():
        Image.fromarray(pixels).save(path)
    segmentation.train_dataloader.dataset.update(options)
    problem = only(segmentation, 'labels')
    assert "'bird'" in problem.found and text in problem.advice


# ---- values of maps


def test_values_without_a_class_are_those_of_all_readers(
    segmentation, tmp_path
):
    pixels = np.resize(np.array([0, 1, 2, 7], np.uint8), (48, 64))
    Image.fromarray(pixels).save(tmp_path / 'maps' / '001.png')
    for mode in ('train', 'val'):
        problem = only(segmentation, 'map_values', mode)
        assert problem.where.endswith('maps/001.png')
        assert problem.found.endswith('that no class has: 7')
    segmentation.model.decode_head.ignore_index = 7
    assert problems_of(segmentation) == []
    # The metric would still count them.
    assert only(segmentation, 'map_values', 'val')
    segmentation.val_evaluator.ignore_index = 7
    assert problems_of(segmentation, 'val') == []
    segmentation.model.auxiliary_head = dict(type='FCNHead')
    assert only(segmentation, 'map_values')


# ---- names of classes


def test_labels_follow_the_order_of_the_file(detection, tmp_path):
    rewrite(tmp_path / 'train.json', lambda c: c['categories'].reverse())
    problem = only(detection, 'categories')
    assert problem.severity == 'error'
    assert "labels as 'bird', 'dog', 'cat'" in problem.found
    assert problem.expected.endswith("'cat', 'dog', 'bird'")


def test_other_names_for_the_same_label(segmentation):
    other = ('dog', 'cat', 'bird')
    segmentation.val_dataloader.dataset.metainfo = dict(classes=other)
    problem = only(segmentation, 'same_classes', 'train', 'val')
    assert problem.severity == 'error'
    assert problem.where == 'val_dataloader.dataset.metainfo'
    named = ('Cat', 'Dog', 'Bird')
    segmentation.val_dataloader.dataset.metainfo = dict(classes=named)
    problem = only(segmentation, 'same_classes', 'train', 'val')
    assert problem.severity == 'warning'


def test_data_sets_that_are_joined(segmentation):
    """The second of a validation; one of fewer classes has their names."""
    first = segmentation.val_dataloader.dataset
    for names, faults in (
        (CLASSES[:2], []),
        (('fox', 'owl'), ['val_dataloader.dataset.datasets.1.metainfo']),
    ):
        both = [first, dict(first, metainfo=dict(classes=names))]
        segmentation.val_dataloader.dataset = dict(
            type='ConcatDataset',
            datasets=both,
            ignore_keys=['classes', 'palette', 'label_map'],
        )
        found = [
            each.where
            for each in problems_of(segmentation, 'train', 'val')
            if each.check == 'same_classes'
        ]
        assert found == faults


def test_weights_of_another_number_of_classes(segmentation):
    head = segmentation.model.decode_head
    head.loss_decode = [dict(type='CrossEntropyLoss', class_weight=[1.0] * 2)]
    problem = only(segmentation, 'class_weights')
    assert problem.found == '2 weights'
    head.loss_decode[0].class_weight = [1.0] * len(CLASSES)
    assert problems_of(segmentation) == []


def test_an_ending_that_no_file_has(segmentation, tmp_path):
    dataset = segmentation.train_dataloader.dataset
    # mmengine cannot serialise what is empty.
    dataset.update(img_suffix='.png', serialize_data=False)
    problems = problems_of(segmentation)
    found = f'no file in {tmp_path}/images ends in .png; there are 4 .jpg'
    assert found in [each.found for each in problems]


def test_boxes_without_area(tmp_path):
    """As they stand in public data of VOC's format."""
    make_coco(tmp_path, 'JPEGImages', 1)
    (tmp_path / 'Annotations').mkdir()
    for name, text in (
        ('list.txt', '000'),
        (
            'Annotations/000.xml',
            '<annotation><size><width>64</width><height>48</height></size>'
            '<object><name>cat</name><bndbox><xmin>9</xmin><ymin>9</ymin>'
            '<xmax>9</xmax><ymax>20</ymax></bndbox></object></annotation>',
        ),
    ):
        (tmp_path / name).write_text(text)
    dataset = dict(
        type='XMLDataset',
        data_root=str(tmp_path),
        data_prefix=dict(sub_data_root=''),
        ann_file='list.txt',
        metainfo=dict(classes=('cat',)),
        pipeline=[dict(type='LoadAnnotations', with_bbox=True)],
    )
    loader = dict(batch_size=1, dataset=dataset)
    config = dict(default_scope='mmdet', train_dataloader=loader)
    problem = only(Config(config), 'boxes')
    assert problem.severity == 'warning'
    assert problem.where == f'{tmp_path}/Annotations/000.xml'
    assert 'the box [8, 8, 8, 19] (x1, y1, x2, y2) has no' in problem.found
    # mmdet then ignores it.
    dataset['filter_cfg'] = dict(bbox_min_size=1)
    assert only(Config(config), 'labels')
