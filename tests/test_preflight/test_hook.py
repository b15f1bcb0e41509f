import io
import json
import os
import types

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, loops
from PIL import Image
from torch import nn

from e3va_mm.errors import ConfigError, DataError
from e3va_mm.preflight import DatasetCheckHook
from e3va_mm.preflight.hook import (
    Leaf,
    check_classes,
    check_files,
    check_not_empty,
    check_num_classes,
    iter_leaves,
)
from tests.ranks import run_ranks
from tests.test_engine.test_hooks.tiny import (
    CLASSES,
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    truncate,
)

OPTION = 'train_dataloader.dataset'


class Files(BaseDataset):
    """Names the given files."""

    def __init__(self, paths, **kwargs):
        self.paths = paths
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self):
        return [dict(img_path=str(path)) for path in self.paths]


def jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(buffer, 'JPEG')
    return buffer.getvalue()


def png():
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(buffer, 'PNG')
    return buffer.getvalue()


def check(*paths, **kwargs):
    return check_files([Leaf(OPTION, Files(paths))], **kwargs)


# ---- files


def test_all_missing_files_are_counted_and_five_named(tmp_path):
    (tmp_path / 'there.jpg').write_bytes(jpeg())
    paths = [tmp_path / f'{i}.jpg' for i in range(1200)]
    with pytest.raises(DataError) as error:
        check(*paths, tmp_path / 'there.jpg')
    text = str(error.value)
    assert '1,200 of 1,201 files that the data names do not exist' in text
    for i in range(5):
        assert f'{tmp_path}/{i}.jpg  [{OPTION}.data_prefix.img_path]' in text
    assert f'{tmp_path}/5.jpg' not in text
    assert '... and 1,195 more' in text


@pytest.mark.parametrize(
    'content, fault',
    [
        pytest.param(jpeg(), None, id='jpeg'),
        pytest.param(png(), None, id='png'),
        pytest.param(jpeg() + b'more', None, id='bytes after a jpeg'),
        pytest.param(png() + b'more', None, id='bytes after a png'),
        pytest.param(b'', 'empty', id='empty'),
        pytest.param(
            jpeg()[:900],
            'cannot be decoded, image file is truncated',
            id='truncated jpeg',
        ),
        pytest.param(
            png()[:900],
            'cannot be decoded, image file is truncated',
            id='truncated png',
        ),
        pytest.param(
            b'<html>404</html>',
            'cannot be decoded, cannot identify',
            id='no picture',
        ),
    ],
)
def test_content(tmp_path, content, fault):
    for suffix in ('.jpg', '.png'):  # what is inside counts, not the name
        path = tmp_path / f'picture{suffix}'
        path.write_bytes(content)
        if fault is None:
            assert check(path) == 1
        else:
            with pytest.raises(DataError) as error:
                check(path)
            assert f'{path}: {fault}' in str(error.value)
            assert f'[{OPTION}.data_prefix.img_path]' in str(error.value)
        assert check(path, check_content=False) == 1


def test_only_odd_files_are_decoded(tmp_path, monkeypatch):
    (tmp_path / 'a.jpg').write_bytes(jpeg())
    (tmp_path / 'b.png').write_bytes(png())
    (tmp_path / 'c.npy').write_bytes(b'no picture')
    (tmp_path / 'd.jpg').write_bytes(jpeg() + b'\0')
    decoded = []
    open_image = Image.open
    monkeypatch.setattr(
        Image, 'open', lambda path: decoded.append(path) or open_image(path)
    )
    assert check(*sorted(tmp_path.iterdir())) == 4
    assert decoded == [str(tmp_path / 'd.jpg')]


@pytest.mark.skipif(os.geteuid() == 0, reason='root reads every file')
def test_unreadable_file(tmp_path):
    (tmp_path / 'a.jpg').touch(mode=0)
    with pytest.raises(DataError, match='cannot be read, Permission denied'):
        check(tmp_path / 'a.jpg')


def test_a_folder_in_place_of_a_picture(tmp_path):
    with pytest.raises(DataError, match='cannot be read, Is a directory'):
        check(tmp_path)


def test_files_on_remote_storage_are_left_alone():
    dataset = Files(['s3://pictures/1.jpg'])
    dataset.backend_args = dict(backend='petrel')
    assert check_files([Leaf(OPTION, dataset)]) == 0


def test_wrappers_are_opened(tmp_path):
    inner = [dict(type=Files, paths=[tmp_path / f'{i}.jpg']) for i in (0, 1)]
    dataset = RepeatDataset(dict(type=ConcatDataset, datasets=inner), 3)
    leaves = list(iter_leaves(dataset, OPTION))
    assert [leaf.option for leaf in leaves] == [
        f'{OPTION}.dataset.datasets.0',
        f'{OPTION}.dataset.datasets.1',
    ]
    with pytest.raises(DataError, match='2 of 2 files'):
        check_files(leaves)


# ---- classes


def coco(folder, **kwargs):
    from mmdet.datasets import CocoDataset

    kwargs = {'metainfo': dict(classes=CLASSES), **kwargs}
    return Leaf(
        OPTION,
        CocoDataset(
            data_root=str(folder),
            ann_file='train.json',
            data_prefix=dict(img='train/'),
            serialize_data=False,
            **kwargs,
        ),
    )


def test_classes_without_category_are_named(tmp_path):
    make_coco(tmp_path, 'train')
    check_classes(coco(tmp_path))
    leaf = coco(tmp_path, metainfo=dict(classes=('cat', 'fox', 'owl')))
    with pytest.raises(DataError) as error:
        check_classes(leaf)
    text = str(error.value)
    assert f'{OPTION}.ann_file: {tmp_path}/train.json has no category' in text
    assert "for 2 of 3 classes: 'fox', 'owl'" in text
    assert "classes of the data set: 'cat', 'fox', 'owl'" in text
    assert "categories of the file: 'cat', 'dog', 'bird'" in text
    assert f'{OPTION}.metainfo=dict(classes=(...))' in text


def test_long_class_lists_are_shortened(tmp_path):
    make_coco(tmp_path, 'train')
    with pytest.raises(DataError, match="'person', .*80 in all"):
        check_classes(coco(tmp_path, metainfo=None))


def test_repeated_categories(tmp_path):
    make_coco(tmp_path, 'train', classes=('cat', 'dog', 'bird', 'cat'))
    with pytest.raises(DataError, match="same name: 'cat'"):
        check_classes(coco(tmp_path))


def test_a_string_of_classes(tmp_path):
    make_coco(tmp_path, 'train', classes=('cat',))
    with pytest.raises(ConfigError, match=r"\('cat', \), with a comma"):
        check_classes(coco(tmp_path, metainfo=dict(classes='cat')))


def test_empty_data_set(tmp_path):
    make_coco(tmp_path, 'train')
    check_not_empty(coco(tmp_path))
    leaf = coco(tmp_path, filter_cfg=dict(min_size=1000))
    with pytest.raises(DataError) as error:
        check_not_empty(leaf)
    assert f'{OPTION} is empty: no picture of {tmp_path}/train.json' in str(
        error.value
    )
    assert "{'min_size': 1000}" in str(error.value)


# ---- heads


class Head(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes


class RPNHead(Head):
    pass


def heads(**children):
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def classes_leaf(*names, **metainfo):
    return Leaf(OPTION, Files([], metainfo=dict(classes=names, **metainfo)))


def test_all_wrong_heads_in_one_error(tmp_path):
    make_coco(tmp_path, 'train')
    config = Config.fromfile(detection_config(tmp_path))
    config.model.roi_head.bbox_head[0].num_classes = 80
    config.model.roi_head.bbox_head[2].num_classes = 4
    with DefaultScope.overwrite_default_scope('mmdet'):
        from mmdet.registry import MODELS

        model = MODELS.build(config.model)
    with pytest.raises(ConfigError) as error:
        check_num_classes(model, [coco(tmp_path)], config)
    lines = str(error.value).splitlines()
    assert f"{OPTION} has 3 classes ('cat', 'dog', 'bird')" in lines[0]
    assert lines[1:3] == [
        '  model.roi_head.bbox_head.0.num_classes: expected 3, received 80',
        '  model.roi_head.bbox_head.2.num_classes: expected 3, received 4',
    ]
    assert not lines[3].startswith('  ')
    config.merge_from_dict(
        {line.split(':')[0].strip(): 3 for line in lines[1:3]}
    )
    check_num_classes(MODELS.build(config.model), [coco(tmp_path)], config)


def test_an_option_for_several_heads_is_named_once():
    model = heads(roi_head=heads(mask_head=nn.ModuleList([Head(9), Head(9)])))
    config = Config(dict(model=dict(roi_head=dict(mask_head=dict()))))
    with pytest.raises(ConfigError) as error:
        check_num_classes(model, [classes_leaf('a', 'b')], config)
    assert str(error.value).count('expected 2') == 1
    assert 'model.roi_head.mask_head.num_classes: expected 2' in str(
        error.value
    )


def test_options_inside_test_time_augmentation():
    config = Config(
        dict(model=dict(type='TTA', module=dict(heads=[dict(), dict()])))
    )
    with pytest.raises(ConfigError, match=r'model\.heads\.1\.num_classes'):
        check_num_classes(
            heads(heads=nn.ModuleList([Head(1), Head(9)])),
            [classes_leaf('a')],
            config,
        )


@pytest.mark.parametrize(
    'model, leaves',
    [
        (heads(rpn_head=Head(1)), [classes_leaf('a', 'b')]),
        (heads(bbox_head=RPNHead(1)), [classes_leaf('a', 'b')]),
        (heads(backbone=Head(-1)), [classes_leaf('a', 'b')]),
        (heads(bbox_head=heads(loss_cls=Head(-1))), [classes_leaf('a', 'b')]),
        (heads(semantic_head=Head(183)), [classes_leaf('a', 'b')]),
        (
            heads(language_model=nn.Module(), bbox_head=Head(256)),
            [classes_leaf('a', 'b')],
        ),
        (
            heads(bbox_head=Head(1)),
            [classes_leaf('a', 'b', thing_classes=['a'])],
        ),
        (
            heads(bbox_head=Head(5)),
            [classes_leaf('a'), classes_leaf('a', 'b')],
        ),
        (heads(bbox_head=Head(5)), [Leaf(OPTION, Files([]))]),
    ],
)
def test_other_counts_are_no_classes(model, leaves):
    check_num_classes(model, leaves, Config(dict()))


# ---- the hook under the stock runner


def build_runner(path):
    config = Config.fromfile(path)
    config.custom_hooks = [dict(type='e3va_mm.DatasetCheckHook')]
    return Runner.from_cfg(config)


def test_detection_data_passes_and_a_missing_picture_stops_it(tmp_path):
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 2)
    path = detection_config(tmp_path)
    runner = build_runner(path)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, DatasetCheckHook))
    assert hook.passed and runner.iter == 2
    (log,) = tmp_path.glob('work/*/*.log')
    assert 'Checked 6 files of train_dataloader, val_dataloader' in (
        log.read_text()
    )

    (tmp_path / 'val' / '001.jpg').unlink()
    runner = build_runner(path)
    with pytest.raises(DataError) as error:
        runner.train()
    assert runner.iter == 0
    assert (
        f'{tmp_path}/val/001.jpg  [val_dataloader.dataset.data_prefix.img]'
    ) in str(error.value)
    with pytest.raises(
        DataError, match=r'\[test_dataloader.dataset.data_prefix.img\]'
    ):
        build_runner(path).test()
    with pytest.raises(
        DataError, match=r'\[val_dataloader.dataset.data_prefix.img\]'
    ):
        build_runner(path).val()


def test_segmentation_heads_and_truncated_maps(tmp_path):
    make_segmentation(tmp_path)
    config = Config.fromfile(segmentation_config(tmp_path))
    config.model.decode_head.num_classes = 150
    config.custom_hooks = [dict(type='e3va_mm.DatasetCheckHook')]
    with pytest.raises(
        ConfigError,
        match='model.decode_head.num_classes: expected 3, received 150',
    ):
        Runner.from_cfg(config).train()

    path = segmentation_config(tmp_path)
    truncate(tmp_path / 'maps' / '002.png')
    runner = build_runner(path)
    with pytest.raises(DataError) as error:
        runner.train()
    assert runner.iter == 0
    assert '1 of 8 files are damaged' in str(error.value)
    assert f'{tmp_path}/maps/002.png: cannot be decoded' in str(error.value)
    assert '[train_dataloader.dataset.data_prefix.seg_map_path]' in str(
        error.value
    ) or '[val_dataloader' in str(error.value)


class Begun(loops._InfiniteDataloaderIterator):
    """As that of mmengine 0.10.7: begins with the loop."""

    def __init__(self, dataloader):
        super().__init__(dataloader)
        self._iterator = iter(dataloader)


@pytest.mark.parametrize('workers, begun', [(1, True), (1, False), (0, True)])
def test_workers_that_no_hook_reaches(tmp_path, monkeypatch, workers, begun):
    if begun:
        monkeypatch.setattr(loops, '_InfiniteDataloaderIterator', Begun)
    make_segmentation(tmp_path)
    config = Config.fromfile(segmentation_config(tmp_path))
    config.custom_hooks = [dict(type='e3va_mm.DatasetCheckHook')]
    config.train_dataloader.num_workers = workers
    config.train_dataloader.persistent_workers = False
    Runner.from_cfg(config).train()
    (log,) = tmp_path.glob('work/*/*.log')
    text = 'samples are not looked at while training: this mmengine starts'
    assert log.read_text().count(text) == (workers == 1 and begun)


def _check_on_two_ranks(rank, folder):
    dataset = Files([f'{folder}/not_there.jpg'])
    loader = types.SimpleNamespace(dataset=dataset)
    runner = types.SimpleNamespace(
        model=nn.Module(), cfg=Config(), train_dataloader=loader, val_loop=None
    )
    try:
        DatasetCheckHook().before_train(runner)
    except DataError as e:
        with open(f'{folder}/{rank}.json', 'w') as file:
            json.dump(str(e), file)


def test_every_rank_raises_the_error_of_the_first(tmp_path):
    run_ranks(_check_on_two_ranks, tmp_path, str(tmp_path))
    texts = [(tmp_path / f'{rank}.json').read_text() for rank in (0, 1)]
    assert texts[0] == texts[1] and 'not_there.jpg' in texts[0]
