"""Adapter files while training, beside the framework's checkpoints."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from safetensors.torch import save_file

from e3va_mm.engine.hooks import AdapterCheckpointHook
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.weights import read_adapter
from tests.helpers import build_stock, randomised
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)
from tests.test_engine.test_hooks.toy import toy_config

HEAD = (
    'decode_head=dict(in_channels=256, in_index=3, '
    "norm_cfg=dict(type='BN')), auxiliary_head=None"
)


def config_with(folder, hook='', more=''):
    """A segmentor of two iterations with the hook; config, trunk's file."""
    make_segmentation(folder)
    config, weights, _ = side_path_config(
        folder,
        segmentation_config(folder),
        HEAD,
        f"""
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False, {hook})]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
{more}
""",
    )
    return config, weights


def runner_of(config, **options):
    config = Config.fromfile(config)
    config.merge_from_dict(options)
    return Runner.from_cfg(config)


def names(folder):
    return sorted(path.name for path in folder.glob('work/*adapter*'))


def iters(*numbers):
    return [f'adapter_iter_{n}.safetensors' for n in numbers]


def test_files_of_a_detector(tmp_path):
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 2)
    config, weights, _ = side_path_config(
        tmp_path,
        detection_config(tmp_path),
        'neck=dict(in_channels=[32, 64, 128, 256])',
        "custom_hooks = [dict(type='e3va_mm.AdapterCheckpointHook', "
        "save_best='coco/bbox_mAP')]",
    )
    runner_of(config).train()
    assert names(tmp_path) == [
        'adapter_best_coco_bbox_mAP_epoch_1.safetensors',
        'adapter_epoch_1.safetensors',
    ]
    work = tmp_path / 'work'
    full = work / 'epoch_1.pth'
    state = torch.load(full, weights_only=False)['state_dict']
    for name in names(tmp_path):
        found = read_adapter(work / name)
        for key, value in found.tensors.items():
            assert torch.equal(value, state[key]), key
        assert found.trunks['backbone.'].source == str(weights)
        assert found.dataset_meta['classes'] == ('cat', 'dog', 'bird')
        assert 'E3VASwinTransformer' in found.config
        assert (work / name).stat().st_size < full.stat().st_size / 10


def toy(folder, iters=2, hooks=(), stop=None, resume=False, **options):
    """A run without a backbone of ours: all that it has is in the files."""
    hook = dict(
        type='e3va_mm.AdapterCheckpointHook', by_epoch=False, **options
    )
    config = toy_config(
        custom_hooks=[hook, *hooks], **{'train_cfg.max_iters': iters}
    )
    return run(config, folder / 'work', resume, stop)


def test_the_newest_and_the_last_stay(tmp_path):
    toy(tmp_path / 'a', 5, max_keep=2)
    assert names(tmp_path / 'a') == iters(4, 5)
    toy(tmp_path / 'b', 5, interval=2)
    assert names(tmp_path / 'b') == iters(2, 4, 5)


def test_files_of_another_run_stay_and_those_of_a_kill_go(tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    other, part = work / iters(9)[0], work / f'.{iters(7)[0]}.part'
    other.write_text('of yesterday')
    part.touch()
    toy(tmp_path, max_keep=1)
    assert names(tmp_path) == iters(2, 9)
    assert other.read_text() == 'of yesterday' and not part.exists()


def test_resuming_goes_on_with_what_is_kept(tmp_path):
    toy(tmp_path, 2, max_keep=2)
    toy(tmp_path, 3, max_keep=2, resume=True)
    assert names(tmp_path) == iters(2, 3)


def hook_of(runner):
    (hook,) = (h for h in runner.hooks if isinstance(h, AdapterCheckpointHook))
    return hook


@pytest.mark.parametrize(
    'options, best',
    [
        (dict(save_best='a/mIoU'), 'a_mIoU_iter_3'),
        (dict(save_best='auto'), 'a_mIoU_iter_3'),
        (dict(save_best='other', rule='greater'), 'other_iter_2'),
        (dict(save_best='a/mIoU', rule='less'), 'a_mIoU_iter_2'),
    ],
)
def test_the_best_stays(tmp_path, options, best):
    runner = toy(tmp_path, **options)
    for i, score in enumerate([0.3, 0.1, 0.5, 0.5, 0.2]):
        runner.train_loop._iter = i + 1
        metrics = {'a/mIoU': score, 'other': -score}
        hook_of(runner).after_val_epoch(runner, metrics)
    best = f'adapter_best_{best}.safetensors'
    assert names(tmp_path) == [best, *iters(1, 2)]


def test_a_best_that_no_checkpoint_knows_is_not_forgotten(tmp_path):
    def trained(score, end, start=None):
        if start is not None:
            newest = tmp_path / 'work' / f'iter_{start}.pth'
            (tmp_path / 'work' / 'last_checkpoint').write_text(str(newest))
        resume = start is not None
        runner = toy(tmp_path, end, save_best='mIoU', resume=resume)
        hook_of(runner).after_val_epoch(runner, dict(mIoU=score))
        return [n for n in names(tmp_path) if 'best' in n]

    best = [f'adapter_best_mIoU_iter_{i}.safetensors' for i in range(5)]
    # Killed after each: no checkpoint follows.
    assert trained(0.5, 2) == [best[2]]
    assert trained(0.3, 3, 2) == [best[2]]
    assert trained(0.7, 4, 3) == [best[4]]
    # From before the best there is none of it yet.
    assert trained(0.6, 3, 2) == [best[3], best[4]]
    # Another run does not have it.
    assert trained(0.1, 2) == [best[2], best[3], best[4]]


def test_files_of_the_run_that_it_is_resumed_from_stay(tmp_path):
    """A checkpoint and the note of the best name files of another folder."""
    runner = toy(tmp_path / 'a', 2, max_keep=2, save_best='mIoU')
    hook_of(runner).after_val_epoch(runner, dict(mIoU=0.5))
    before = names(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    checkpoint = tmp_path / 'b' / 'work' / 'iter_2.pth'
    checkpoint.with_name('last_checkpoint').write_text(str(checkpoint))
    runner = toy(tmp_path / 'b', 4, max_keep=2, save_best='mIoU', resume=True)
    hook_of(runner).after_val_epoch(runner, dict(mIoU=0.7))
    assert names(tmp_path / 'a') == before
    best = 'adapter_best_mIoU_iter_4.safetensors'
    assert names(tmp_path / 'b') == [best, *iters(3, 4)]


def test_no_number_is_not_the_best(tmp_path):
    runner = toy(tmp_path, save_best='mIoU')
    for score in (0.5, float('nan'), 0.2):
        hook_of(runner).after_val_epoch(runner, dict(mIoU=score))
    assert hook_of(runner)._best['score'] == 0.5


def test_a_validation_alone_writes_nothing(tmp_path):
    hook = AdapterCheckpointHook(save_best='mIoU')
    hook.after_val_epoch(SimpleNamespace(work_dir=tmp_path), dict(mIoU=0.5))
    assert not [*tmp_path.iterdir()]


def test_a_metric_that_is_none(tmp_path):
    runner = toy(tmp_path, save_best='mAP')
    text = "`save_best` is 'mAP', but evaluation gives aAcc, mIoU"
    with pytest.raises(ConfigError, match=text):
        hook_of(runner).after_val_epoch(runner, dict(aAcc=1, mIoU=1))


def test_an_average_is_what_is_saved(tmp_path):
    runner = toy(tmp_path, hooks=[dict(type='EMAHook', momentum=0.3)])
    full = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)
    found = read_adapter(tmp_path / 'work' / iters(2)[0]).tensors
    key = 'head.weight'
    assert torch.equal(found[key], full['state_dict'][key])
    assert not torch.equal(found[key], runner.model.state_dict()[key])


def test_a_full_disk_ends_the_run_and_leaves_what_is_there(
    tmp_path, monkeypatch
):
    real = os.replace

    def replace(old, new):
        if 'adapter_iter_2' in str(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(CheckpointError) as error:
        toy(tmp_path, max_keep=1)
    text = str(error.value)
    assert str(tmp_path / 'work' / iters(2)[0]) in text
    assert 'MiB of room' in text and 'No space left on device' in text
    assert names(tmp_path) == iters(1)
    read_adapter(tmp_path / 'work' / iters(1)[0])


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    name = 'e3va_mm.engine.hooks.adapter_checkpoint_hook.is_main_process'
    monkeypatch.setattr(name, lambda *args: False)
    runner = toy(tmp_path, save_best='auto')
    hook_of(runner).after_val_epoch(runner, dict(mIoU=1))
    assert names(tmp_path) == []


def test_load_from_is_where_the_trunk_came_from(tmp_path):
    config, weights = config_with(tmp_path)
    whole = tmp_path / 'detector.safetensors'
    trunk = randomised(build_stock(), seed=1).state_dict()
    save_file({f'backbone.{k}': v for k, v in trunk.items()}, whole)
    options = dict(load_from=str(whole))
    runner_of(config, **options).train()
    found = read_adapter(tmp_path / 'work' / iters(2)[0])
    assert found.trunks['backbone.'].source == str(whole)
    # Nor does a resume forget it.
    runner = runner_of(
        config,
        **{'train_cfg.max_iters': 3},
        resume=True,
        load_from=str(tmp_path / 'work' / 'iter_2.pth'),
    )
    runner.train()
    found = read_adapter(tmp_path / 'work' / iters(3)[0])
    assert found.trunks['backbone.'].source == str(whole)


def test_training_starts_from_an_adapter_file(tmp_path):
    config, weights = config_with(tmp_path)
    runner_of(config).train()
    first = tmp_path / 'first.safetensors'
    (tmp_path / 'work' / iters(2)[0]).rename(first)
    runner = runner_of(config, load_from=str(first))
    runner.train()
    found = read_adapter(tmp_path / 'work' / iters(2)[0])
    assert found.trunks == read_adapter(first).trunks


def test_a_random_trunk_is_refused_before_the_first_step(tmp_path):
    config, _ = config_with(tmp_path)
    options = {
        'model.backbone.init_cfg': None,
        'model.backbone.allow_random_trunk': True,
    }
    with pytest.raises(ConfigError, match='but they are random'):
        runner_of(config, **options).train()


def test_a_loop_of_iterations_has_no_epochs(tmp_path):
    hook = dict(type='e3va_mm.AdapterCheckpointHook')
    with pytest.raises(ConfigError, match='Set `by_epoch=False`'):
        run(toy_config(custom_hooks=[hook]), tmp_path)


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(interval=0), 'interval` should be a whole number from 1 on'),
        (dict(max_keep=1.5), 'max_keep` should be a whole number from 1'),
        (dict(rule='more'), "rule` should be one of ('greater', 'less'), but"),
        (dict(save_best=['a']), 'save_best` should be one metric, or None'),
        (dict(keep=3), 'keep` is unknown'),
    ],
)
def test_options_that_cannot_work(options, expected):
    with pytest.raises(ConfigError) as error:
        AdapterCheckpointHook(**options)
    assert expected in str(error.value)
