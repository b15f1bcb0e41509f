"""Each check of config and data by itself."""

import io
import os

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.registry import DefaultScope
from PIL import Image, ImageFile
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.preflight.classes import (
    check_categories,
    check_class_names,
    check_heads,
    check_not_empty,
)
from e3va_mm.preflight.files import check_files, check_map_sizes
from e3va_mm.preflight.problems import (
    Problem,
    iter_datasets,
    raise_errors,
    report,
)
from e3va_mm.preflight.reading import ReadDataset
from tests.test_engine.test_hooks.tiny import (
    CLASSES,
    detection_config,
    make_coco,
)

OPTION = 'train_dataloader.dataset'


class Files(BaseDataset):
    """Names the given files."""

    def __init__(self, *paths, maps=(), **kwargs):
        self.paths, self.maps = paths, maps
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self):
        entries = [dict(img_path=str(path)) for path in self.paths]
        for entry, path in zip(entries, self.maps, strict=False):
            entry['seg_map_path'] = str(path)
        return entries


def encoded(form):
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(buffer, form)
    return buffer.getvalue()


JPEG, PNG = encoded('JPEG'), encoded('PNG')


def found(check, dataset, *model, config=None, **kwargs):
    read = {OPTION: ReadDataset(OPTION, dataset, **kwargs)}
    return [*check(Config(config or {}), read, *model)]


def only(check, dataset, *args, **kwargs):
    (problem,) = found(check, dataset, *args, **kwargs)
    return problem


# ---- reports


def test_a_report_groups_and_shortens():
    problems = [Problem(f'{i}.jpg', 'bad', 'good', 'Do.') for i in range(1200)]
    other = Problem('option', 'one', 'two', 'Mend it.', error=ConfigError)
    lines = report([*problems, other]).splitlines()
    assert lines[0] == '0.jpg: bad; expected good.'
    assert lines[10:] == [
        '... and 1,190 more',
        'Do.',
        'option: one; expected two.',
        'Mend it.',
    ]
    with pytest.raises(ConfigError, match='option: one'):
        raise_errors([other, *problems])
    raise_errors([Problem('a', 'b', 'c', 'd', severity='warning')])


def test_wrappers_are_opened():
    inner = [dict(type=Files) for _ in range(2)]
    dataset = RepeatDataset(dict(type=ConcatDataset, datasets=inner), 3)
    options = [f'{OPTION}.dataset.datasets.{i}' for i in (0, 1)]
    assert [*dict(iter_datasets(dataset, OPTION))] == options
    assert [*iter_datasets(None, OPTION)] == []  # `val_dataloader=None`
    config = dict(dataset=dict(datasets=inner))
    assert [*dict(iter_datasets(config, OPTION))] == options


# ---- files


@pytest.mark.parametrize(
    'content, fault',
    [
        pytest.param(JPEG, None, id='jpeg'),
        pytest.param(PNG, None, id='png'),
        pytest.param(JPEG + b'more', None, id='bytes after a jpeg'),
        pytest.param(PNG + b'more', None, id='bytes after a png'),
        pytest.param(b'', 'the file is empty', id='empty'),
        pytest.param(JPEG[:900], 'cannot be decoded, image', id='half jpeg'),
        pytest.param(PNG[:900], 'cannot be decoded, image', id='half png'),
        pytest.param(b'<html>', 'cannot be decoded, cannot', id='no image'),
    ],
)
def test_content(tmp_path, content, fault):
    for suffix in ('.jpg', '.png'):  # what is inside counts, not the name
        path = tmp_path / f'image{suffix}'
        path.write_bytes(content)
        dataset = Files(path)
        if fault is None:
            assert found(check_files, dataset) == []
        else:
            problem = only(check_files, dataset)
            assert problem.where == str(path)
            assert problem.found.startswith(fault)
            assert f'{OPTION}.data_prefix.img_path' in problem.expected
        assert found(check_files, dataset, seconds=0) == []


def test_only_odd_files_are_decoded(tmp_path, monkeypatch):
    (tmp_path / 'a.jpg').write_bytes(JPEG)
    (tmp_path / 'b.png').write_bytes(PNG)
    (tmp_path / 'c.npy').write_bytes(b'no image')
    (tmp_path / 'd.jpg').write_bytes(JPEG + b'\0')
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile,
        'load',
        lambda image: decoded.append(image.filename) or load(image),
    )
    assert found(check_files, Files(*sorted(tmp_path.iterdir()))) == []
    assert decoded == [str(tmp_path / 'd.jpg')]


def test_files_that_cannot_be_read(tmp_path):
    folder = only(check_files, Files(tmp_path))
    assert folder.found == 'cannot be read, Is a directory'
    for seconds in (None, 0):
        problem = only(check_files, Files('none.jpg'), seconds=seconds)
        assert problem.found == 'no such file'
        assert problem.advice.startswith('Check these options, data_root')
    for name in ('b', 'c'):
        (tmp_path / f'{name}.png').touch()
    names = [tmp_path / f'{name}.jpg' for name in 'bcd']
    problems = found(check_files, Files(*names))
    assert [each.found for each in problems] == [
        'no such file (there is b.png)',
        'no such file (there is c.png)',
        'no such file',
    ]
    assert len({each.advice for each in problems}) == 1  # one report
    if os.geteuid() != 0:  # root reads every file
        (tmp_path / 'a.jpg').touch(mode=0)
        problem = only(check_files, Files(tmp_path / 'a.jpg'))
        assert problem.found == 'cannot be read, Permission denied'


def test_what_is_not_local_is_left_to_its_loader(tmp_path):
    """A backend of the data set, of the loader, a prefix; own loaders."""
    from mmcv.transforms import LoadImageFromFile

    class LoadOther:
        def __call__(self, info):
            return info

    dataset = Files('images/1.jpg', maps=['maps/1.png'])
    dataset.backend_args = dict(backend='petrel')
    assert found(check_files, dataset) == []
    assert found(check_map_sizes, dataset) == []
    assert found(check_files, Files('s3://images/1.jpg')) == []
    for load in (
        LoadImageFromFile(backend_args=dict(backend='zip')),
        LoadOther(),
    ):
        dataset = Files('1.jpg', pipeline=[load])
        assert found(check_files, dataset) == []
    dataset = Files('1.jpg', pipeline=[LoadImageFromFile()])
    assert only(check_files, dataset).found == 'no such file'
    # Maps that nothing loads, of predictions.
    dataset = Files('1.jpg', maps=['1.png'], pipeline=[LoadImageFromFile()])
    assert only(check_files, dataset).where == '1.jpg'


def test_maps_of_another_size(tmp_path):
    def write(name, height, width, **options):
        pixels = np.zeros((height, width), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, **options)

    turned = Image.Exif()
    turned[274] = 6
    write('0.jpg', 48, 64)
    write('1.jpg', 48, 64, exif=turned)
    write('0.png', 48, 64)
    write('1.png', 64, 48)  # readers turn the image upright
    images = [tmp_path / f'{i}.jpg' for i in (0, 1)]
    maps = [tmp_path / f'{i}.png' for i in (0, 1)]
    assert found(check_map_sizes, Files(*images, maps=maps)) == []
    first, second = found(check_map_sizes, Files(*images, maps=maps[::-1]))
    assert str(first) == (
        f'{maps[1]}: the map has 48 x 64 pixels; expected 64 x 48 as its '
        f'image {images[0]}.'
    )
    assert str(second).endswith(f'its image {images[1]} (EXIF orientation 6).')


# ---- classes


def coco(folder, **kwargs):
    from mmdet.datasets import CocoDataset

    return CocoDataset(
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        serialize_data=False,
        **{'metainfo': dict(classes=CLASSES), **kwargs},
    )


def test_classes_without_category_are_named(tmp_path):
    make_coco(tmp_path, 'train', classes=(*CLASSES, 'cat'))
    dataset = coco(tmp_path, metainfo=dict(classes=('dog', 'fox', 'owl')))
    problem = only(check_categories, dataset)
    assert str(problem) == (
        f'{OPTION}.ann_file: {tmp_path}/train.json has no category for 2 of 3 '
        "classes: 'fox', 'owl' (its categories: 'cat', 'dog', 'bird', 'cat'); "
        'expected one category for each class of the data set: '
        "'dog', 'fox', 'owl'."
    )
    assert f'{OPTION}.metainfo=dict(classes=(...))' in problem.advice
    all_of_coco = only(check_categories, coco(tmp_path, metainfo=None))
    assert "'traffic light'" in all_of_coco.expected
    assert 'and 60 more' in all_of_coco.expected
    repeated = only(check_categories, coco(tmp_path))
    assert "several categories of the same name: 'cat'" in repeated.found
    dataset = coco(tmp_path, metainfo=dict(classes=('dog', 'bird')))
    assert found(check_categories, dataset) == []


def test_a_string_of_classes():
    dataset = Files()
    assert found(check_class_names, dataset) == []
    dataset._metainfo = dict(classes='cat')
    problem = only(check_class_names, dataset)
    assert problem.error is ConfigError
    assert "classes=('cat', ), with a comma" in problem.advice


def test_an_empty_data_set(tmp_path):
    make_coco(tmp_path, 'train')
    assert found(check_not_empty, coco(tmp_path)) == []
    dataset = coco(tmp_path, filter_cfg=dict(min_size=1000))
    problem = only(check_not_empty, dataset)
    assert problem.where == OPTION
    assert f'no image of {tmp_path}/train.json is left' in problem.found
    assert "{'min_size': 1000}" in problem.advice


# ---- heads


class Head(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes


class RPNHead(Head):
    pass


class ClassAgnostic(Head):
    class_agnostic = True


def heads(**children):
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


class Preprocessor(Head):
    to_onehot = False


def test_classes_of_a_preprocessor_count_where_it_uses_them():
    model = heads(data_preprocessor=Preprocessor(1000))
    assert found(check_heads, classes('a', 'b'), model) == []
    model.data_preprocessor.to_onehot = True
    own = dict(model=dict(), data_preprocessor=dict(num_classes=1000))
    problem = only(check_heads, classes('a', 'b'), model, config=own)
    assert problem.where == 'data_preprocessor.num_classes'


def classes(*names, **metainfo):
    return Files(metainfo=dict(classes=names, **metainfo))


def test_all_wrong_heads_in_one_error(tmp_path):
    from mmdet.registry import MODELS

    make_coco(tmp_path, 'train')
    config = Config.fromfile(detection_config(tmp_path))
    config.model.roi_head.bbox_head[0].num_classes = 80
    config.model.roi_head.bbox_head[2].num_classes = 4
    datasets = {OPTION: ReadDataset(OPTION, coco(tmp_path))}
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config.model)
        with pytest.raises(ConfigError) as error:
            raise_errors(check_heads(config, datasets, model))
        lines = str(error.value).splitlines()
        for line, i, received in zip(lines, (0, 2), (80, 4), strict=False):
            assert line == (
                f'model.roi_head.bbox_head.{i}.num_classes: received '
                f'{received}; expected 3, the classes of {OPTION} '
                "('cat', 'dog', 'bird')."
            )
        assert len(lines) == 3
        right = {line.split(':')[0]: 3 for line in lines[:2]}
        config.merge_from_dict(right)
        model = MODELS.build(config.model)
    assert [*check_heads(config, datasets, model)] == []


def test_options_of_heads():
    """One for several heads; inside of test time augmentation."""
    model = heads(roi_head=heads(mask_head=nn.ModuleList([Head(9), Head(9)])))
    own = dict(roi_head=dict(mask_head=dict()))
    for config in (own, dict(type='TTA', module=own)):
        config = dict(model=config)
        problem = only(check_heads, classes('a'), model, config=config)
        assert problem.where == 'model.roi_head.mask_head.num_classes'


def test_other_counts_are_no_classes():
    cases = [
        (heads(rpn_head=Head(1)), classes('a', 'b')),
        (heads(bbox_head=RPNHead(1)), classes('a', 'b')),
        (heads(backbone=Head(-1)), classes('a', 'b')),
        (heads(bbox_head=heads(loss_cls=Head(-1))), classes('a', 'b')),
        (heads(semantic_head=Head(183)), classes('a', 'b')),
        (heads(language_model=nn.Module(), head=Head(9)), classes('a', 'b')),
        (heads(bbox_head=Head(1)), classes('a', 'b', thing_classes=['a'])),
        (heads(bbox_head=Head(5)), classes('a'), classes('a', 'b')),
        (heads(bbox_head=Head(5)), Files()),
        (heads(mask_head=ClassAgnostic(80)), classes('a', 'b')),
    ]
    for model, *datasets in cases:
        options = [f'{OPTION}.datasets.{i}' for i in range(len(datasets))]
        read = {
            option: ReadDataset(option, dataset)
            for option, dataset in zip(options, datasets, strict=True)
        }
        assert [*check_heads(Config(), read, model)] == []
