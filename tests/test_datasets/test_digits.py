import importlib.util
import json
import os
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from e3va_mm.datasets import digits
from e3va_mm.datasets.digits import (
    CLASSES,
    PHOTOGRAPHS,
    SPLITS,
    build_dataset,
    digit_partition,
    make_scene,
    mask_box,
    photograph_region,
)
from e3va_mm.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(train=5, val=3, test=2, size=96)
SEG_CLASSES = ('background', *CLASSES)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'digits'
    assert build_dataset(out, **SMALL)
    return out


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file()
    }


# The material -------------------------------------------------------------


def test_every_digit_sample_is_in_one_split():
    from sklearn.datasets import load_digits

    source = load_digits()
    parts = digit_partition()
    together = np.concatenate([parts[split] for split in SPLITS])
    assert sorted(together) == list(range(1797))
    # By content too: two equal scans would be one sample.
    scans = {
        split: {source.images[i].tobytes() for i in part}
        for split, part in parts.items()
    }
    for a, b in combinations(SPLITS, 2):
        assert not scans[a] & scans[b]
    for part in parts.values():
        assert np.bincount(source.target[part]).min() >= 25


def test_regions_of_photographs_are_disjoint_and_inside():
    for name in PHOTOGRAPHS:
        height, width = digits._photograph(name).shape[:2]
        owners = np.zeros((height, width), int)
        for split in SPLITS:
            x0, y0, x1, y1 = photograph_region(split, name)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            owners[y0:y1, x0:x1] += 1
        assert owners.max() == 1
        assert (owners == 1).mean() > 0.99


@pytest.mark.parametrize('split', SPLITS)
def test_scenes_use_the_material_of_their_split_only(split):
    for index in range(20):
        scene = make_scene(split, index, 96, digit_size=(20, 30))
        assert set(scene.samples) <= set(digit_partition()[split])
        x0, y0, x1, y1 = photograph_region(split, scene.photograph)
        left, top, right, bottom = scene.crop
        assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1


def test_a_digit_looks_like_its_scan():
    # Upright and undone, the pasted ink correlates with the 8x8 scan of its
    # own sample better than with the mean scan of the other classes.
    images, labels = digits._digits()
    means = np.stack([images[labels == d].mean(0) for d in range(10)])
    right = 0
    for sample in range(100):
        glyph = digits._glyph(sample)[16:80, 16:80]
        small = cv2.resize(glyph, (8, 8), interpolation=cv2.INTER_AREA)
        scores = [np.corrcoef(small.ravel(), m.ravel())[0, 1] for m in means]
        right += int(np.argmax(scores) == labels[sample])
    assert right >= 80


# Scenes -------------------------------------------------------------------


def test_masks_are_visible_disjoint_and_labelled():
    truth = digits._digits()[1]
    counts, contrast = [], []
    for index in range(20):
        scene = make_scene('train', index)
        assert scene.image.shape == (224, 224, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.sum(0).max() == 1
        assert list(scene.labels) == [truth[s] for s in scene.samples]
        counts.append(len(scene.labels))
        for mask in scene.masks:
            x0, y0, x1, y1 = mask_box(mask)
            assert 4 <= x1 - x0 <= 110 and 15 <= y1 - y0 <= 110
        grey, mask = scene.image.mean(2) / 255, scene.masks[-1]
        ring = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) > 0
        contrast.append(abs(grey[mask].mean() - grey[ring & ~mask].mean()))
    assert min(counts) >= 1 and max(counts) <= 6
    assert np.mean(counts) > 3
    assert np.median(contrast) > 0.15


def test_no_digit_is_nearly_hidden():
    # The first digit drawn alone has the same mask as in the full scene
    # before anything covers it.
    hidden = 0
    for index in range(20):
        whole = make_scene('train', index, objects=(6, 6)).masks[0].sum()
        alone = make_scene('train', index, objects=(1, 1)).masks[0].sum()
        assert whole >= 0.7 * alone
        hidden += whole < alone
    assert hidden > 0  # occlusion does happen


def test_scene_depends_on_seed_split_and_index_only():
    scene = make_scene('val', 3, seed=1)
    make_scene('val', 4, seed=1)
    again = make_scene('val', 3, seed=1)
    assert np.array_equal(scene.image, again.image)
    assert np.array_equal(scene.masks, again.masks)
    for other in (('val', 3, 2), ('val', 4, 1), ('test', 3, 1)):
        split, index, seed = other
        scene_of = make_scene(split, index, seed=seed)
        assert not np.array_equal(scene.image, scene_of.image)


# Files --------------------------------------------------------------------


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'make_digits', ROOT / 'tools' / 'make_digits.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def tool(out, **options):
        settings = {**SMALL, **options}
        return module.main(
            [f'--out={out}', *(f'--{k}={v}' for k, v in settings.items())]
        )

    return tool


def test_same_bytes_again_then_left_alone(data, tool, tmp_path, capsys):
    out = tmp_path / 'digits'
    assert tool(out) == 0
    assert '5 train, 3 val and 2 test images' in capsys.readouterr().out
    assert tree(out) == tree(data)
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert tool(out) == 0
    assert 'complete with these settings' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} == before


def test_damaged_or_other_set_is_rebuilt(data, tmp_path):
    out = tmp_path / 'digits'
    # What a killed build left.
    (tmp_path / '.digits.part' / 'coco').mkdir(parents=True)
    assert build_dataset(out, **SMALL)
    (out / 'coco/val/val_000001.jpg').unlink()
    assert build_dataset(out, **SMALL)
    assert tree(out) == tree(data)
    (out / 'digits.json').write_text('{"form')
    assert build_dataset(out, **SMALL)
    assert build_dataset(out, **SMALL, seed=1)
    assert tree(out) != tree(data)
    assert not build_dataset(out, **SMALL, seed=1)
    assert os.listdir(tmp_path) == ['digits']


def test_what_was_not_made_here_is_refused_and_kept(tool, tmp_path, capsys):
    out = tmp_path / 'mine'
    out.mkdir()
    (out / 'thesis.txt').write_text('five years')
    assert tool(out) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'error: Expected {out} to be absent, empty, or a')
    assert 'Choose another folder' in error
    assert (out / 'thesis.txt').read_text() == 'five years'
    out = tmp_path / 'file'
    out.write_text('x')
    with pytest.raises(DataError, match='something else'):
        build_dataset(out, **SMALL)


@pytest.mark.parametrize('wrong', [dict(val=0), dict(size=95), dict(seed=-1)])
def test_bad_arguments(tmp_path, wrong):
    with pytest.raises(ConfigError, match='Expected at least 1 image'):
        build_dataset(tmp_path / 'x', **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(json, 'dumps', full_disk)
    with pytest.raises(OSError):
        build_dataset(tmp_path / 'digits', **SMALL)
    assert not list(tmp_path.iterdir())


def test_works_without_hard_links(data, tmp_path, monkeypatch):
    assert os.stat(data / 'coco/val/val_000000.jpg').st_nlink == 3

    def no_links(*args):
        raise PermissionError('no hard links here')

    monkeypatch.setattr(os, 'link', no_links)
    out = tmp_path / 'digits'
    build_dataset(out, **SMALL)
    assert os.stat(out / 'coco/val/val_000000.jpg').st_nlink == 1
    assert tree(out) == tree(data)


# Layouts ------------------------------------------------------------------


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_coco_annotations_agree_with_themselves(data, split):
    path = data / f'coco/annotations/instances_{split}.json'
    coco = COCO(str(path))
    assert len(coco.imgs) == SMALL[split]
    content = json.loads(path.read_text())
    assert {lic['name'] for lic in content['licenses']} == {
        'CC BY 2.0',
        'CC0',
        'public domain',
    }
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        x0, y0, x1, y1 = mask_box(mask > 0)
        assert ann['bbox'] == [x0, y0, x1 - x0, y1 - y0]
        assert ann['area'] == mask.sum() == coco_mask.area(ann['segmentation'])
    for i, info in coco.imgs.items():
        image = cv2.imread(str(data / 'coco' / split / info['file_name']))
        assert image.shape == (info['height'], info['width'], 3)
        stem = Path(info['file_name']).stem
        semantic = cv2.imread(
            str(data / f'VOC2007/SegmentationClass/{stem}.png'), -1
        )
        expected = np.zeros_like(semantic)
        for ann in coco.imgToAnns[i]:
            expected[coco.annToMask(ann) > 0] = ann['category_id']
        assert np.array_equal(semantic, expected)


def test_mmdet_reads_coco_and_voc_alike(data):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset, VOCDataset
    from mmdet.datasets.transforms import LoadAnnotations

    coco = CocoDataset(
        data_root=str(data / 'coco'),
        metainfo=dict(classes=CLASSES),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
    )
    voc = VOCDataset(
        data_root=str(data),
        metainfo=dict(classes=CLASSES),
        ann_file='VOC2007/ImageSets/Main/train.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
    )
    assert len(coco) == len(voc) == SMALL['train']
    load = LoadAnnotations(with_mask=True)
    for i in range(len(coco)):
        a, b = coco.get_data_info(i), voc.get_data_info(i)
        assert (
            Path(a['img_path']).read_bytes()
            == Path(b['img_path']).read_bytes()
        )
        assert [x['bbox_label'] for x in a['instances']] == [
            x['bbox_label'] for x in b['instances']
        ]
        # mmdet's VOC boxes end on the last pixel, COCO's behind it.
        assert np.array_equal(
            [np.subtract(x['bbox'], (0, 0, 1, 1)) for x in a['instances']],
            [x['bbox'] for x in b['instances']],
        )
        a['img_shape'] = a['ori_shape'] = (a['height'], a['width'])
        loaded = load(a)
        boxes = loaded['gt_masks'].get_bboxes('hbox').tensor
        assert np.array_equal(boxes, loaded['gt_bboxes'].tensor)
        labels = loaded['gt_bboxes_labels']
        assert list(labels) == [
            digits.make_scene(
                'train', i, 96, 0, digit_size=(24 * 96 / 224, 72 * 96 / 224)
            ).labels[k]
            for k in range(len(labels))
        ]


def read_seg(cls, i=0, **kwargs):
    from mmengine.registry import DefaultScope

    # Commands that ran in this process have left a scope of their own.
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = cls(
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
            ],
            **kwargs,
        )
        item = dataset[i]
    assert item['img'].shape[:2] == item['gt_seg_map'].shape == (96, 96)
    return len(dataset), item['gt_seg_map']


def test_mmseg_reads_ade20k_and_voc(data):
    pytest.importorskip('mmseg')
    from mmseg.datasets import (
        ADE20KDataset,
        BaseSegDataset,
        PascalVOCDataset,
    )

    truth = digits.semantic_map(
        make_scene('val', 0, 96, 0, digit_size=(24 * 96 / 224, 72 * 96 / 224))
    )
    ade = dict(
        data_root=str(data / 'ade20k'),
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
    )
    n, seg = read_seg(
        BaseSegDataset, metainfo=dict(classes=SEG_CLASSES), **ade
    )
    assert n == SMALL['val'] and np.array_equal(seg, truth)
    n, seg = read_seg(ADE20KDataset, **ade)
    ignored = truth.astype(int) - 1
    ignored[truth == 0] = 255
    assert n == SMALL['val'] and np.array_equal(seg, ignored)
    n, seg = read_seg(
        PascalVOCDataset,
        data_root=str(data / 'VOC2007'),
        ann_file='ImageSets/Segmentation/val.txt',
        data_prefix=dict(
            img_path='JPEGImages', seg_map_path='SegmentationClass'
        ),
    )
    assert n == SMALL['val'] and np.array_equal(seg, truth)


# Configs ------------------------------------------------------------------


def load_config(tmp_path, text, data_root):
    from mmengine.config import Config

    path = tmp_path / 'child.py'
    path.write_text(text.replace('CONFIGS', str(ROOT / 'configs')))
    cfg = Config.fromfile(path)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[key].dataset.data_root = data_root
    return cfg


def test_detection_base_beside_stock_bases(data, tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.utils import register_all_modules
    from mmengine.registry import DATASETS, METRICS, DefaultScope

    cfg = load_config(
        tmp_path,
        """
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
          'mmdet::_base_/default_runtime.py',
          'CONFIGS/_base_/digits_detection.py',
          'CONFIGS/_base_/swin_nano.py']
model = dict(backbone=dict(
    _delete_=True, type='SwinTransformer', **_base_.swin_nano))
""",
        str(data / 'coco'),
    )
    assert cfg.model.type == 'CascadeRCNN'
    assert cfg.model.backbone.depths == (2, 2, 4, 2)
    assert cfg.model.backbone.init_cfg.checkpoint == (
        'e3va_mm://swin_nano_digits.safetensors'
    )
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        for part in ('train', 'val', 'test'):
            dataset = DATASETS.build(cfg[f'{part}_dataloader'].dataset)
            assert len(dataset) == SMALL[part]
            assert dataset.metainfo['classes'] == CLASSES
            item = dataset[0]
            assert item['inputs'].shape == (3, 224, 224)
            gt = item['data_samples'].gt_instances
            assert len(gt.labels) == len(gt.masks) >= 1
        for part in ('val', 'test'):
            evaluator = cfg[f'{part}_evaluator']
            assert evaluator.ann_file == (
                f'data/digits/coco/annotations/instances_{part}.json'
            )
            evaluator.ann_file = str(
                data / f'coco/annotations/instances_{part}.json'
            )
            assert METRICS.build(evaluator).metrics == ['bbox', 'segm']


def test_segmentation_base_beside_stock_bases(data, tmp_path):
    mmseg = pytest.importorskip('mmseg')
    from mmengine.registry import DATASETS, METRICS, DefaultScope
    from mmseg.utils import register_all_modules

    stock = str(Path(mmseg.__file__).parent / '.mim/configs')
    cfg = load_config(
        tmp_path,
        """
_base_ = ['MMSEG/_base_/models/upernet_swin.py',
          'MMSEG/_base_/default_runtime.py',
          'CONFIGS/_base_/digits_segmentation.py',
          'CONFIGS/_base_/swin_nano.py']
model = dict(backbone=_base_.swin_nano)
""".replace('MMSEG', stock),
        str(data / 'ade20k'),
    )
    assert cfg.model.type == 'EncoderDecoder'
    assert cfg.model.backbone.type == 'SwinTransformer'
    assert cfg.model.backbone.embed_dims == 32
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmseg'):
        for part in ('train', 'val', 'test'):
            dataset = DATASETS.build(cfg[f'{part}_dataloader'].dataset)
            assert len(dataset) == SMALL[part]
            item = dataset[0]
            assert item['inputs'].shape == (3, 224, 224)
            seg = item['data_samples'].gt_sem_seg.data
            assert 0 in seg and 1 <= int(seg[seg < 255].max()) <= 10
        METRICS.build(cfg.val_evaluator)
