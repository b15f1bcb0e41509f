"""DatasetCheckHook under the stock runner."""

import json
import types

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from e3va_mm.errors import ConfigError, DataError
from e3va_mm.preflight import DatasetCheckHook, check_batch
from tests.ranks import run_ranks
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    truncate,
)
from tests.test_preflight.test_checks import Files

HOOKS = [dict(type='e3va_mm.DatasetCheckHook')]


def build_runner(path):
    return Runner.from_cfg(Config.fromfile(path))


def test_detection_data_passes_and_a_missing_image_stops_it(tmp_path):
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 2)
    path = detection_config(tmp_path, custom_hooks=HOOKS)
    runner = build_runner(path)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, DatasetCheckHook))
    assert hook.passed and runner.iter == 2
    (log,) = tmp_path.glob('work/*/*.log')
    assert (
        'Checked the data of train_dataloader, val_dataloader, 6 samples'
    ) in log.read_text()

    (tmp_path / 'val' / '001.jpg').unlink()
    for run, loader in (('train', 'val'), ('test', 'test')):
        runner = build_runner(path)
        with pytest.raises(DataError) as error:
            getattr(runner, run)()
        assert str(error.value).startswith(
            f'{tmp_path}/val/001.jpg: no such file; expected a whole file, as '
            f'{loader}_dataloader.dataset.data_prefix.img says.'
        )
        assert runner.iter == 0


def test_all_problems_in_one_error(tmp_path):
    make_segmentation(tmp_path)
    truncate(tmp_path / 'maps' / '002.png')
    config = Config.fromfile(segmentation_config(tmp_path, custom_hooks=HOOKS))
    config.model.decode_head.num_classes = 150
    runner = Runner.from_cfg(config)
    with pytest.raises(ConfigError) as error:
        runner.train()
    assert runner.iter == 0
    text = str(error.value)
    assert 'model.decode_head.num_classes: received 150; expected 3' in text
    assert f'{tmp_path}/maps/002.png: cannot be decoded' in text
    assert '.dataset.data_prefix.seg_map_path says' in text


def _check_on_two_ranks(rank, folder):
    loader = types.SimpleNamespace(dataset=Files(f'{folder}/not_there.jpg'))
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


def test_options():
    with pytest.raises(ConfigError, match='`check_content` should be True'):
        DatasetCheckHook(check_content='no')


def test_a_failed_step_over_images_that_are_no_images():
    cause = RuntimeError('no anchor')
    with pytest.raises(DataError) as error:
        check_batch([('a.jpg', (1, 64)), ('b.jpg', (480, 640))], cause)
    assert error.value.__cause__ is cause
    text = str(error.value)
    assert text.startswith('a.jpg: 1 x 64 pixels reach the model; expected')
    assert '(RuntimeError: no anchor)' in text and 'b.jpg' not in text
    check_batch([('b.jpg', (480, 640)), ('c.jpg', ())], cause)
    if hasattr(cause, '__notes__'):  # Python >= 3.11
        assert 'b.jpg' in cause.__notes__[0]
