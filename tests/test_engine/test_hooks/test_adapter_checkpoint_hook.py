"""Adapter files while training, beside the framework's checkpoints."""

import errno
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from safetensors.torch import save_file

from e3va_mm.commands import launch
from e3va_mm.engine.hooks import AdapterCheckpointHook
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.weights import adapter_file, read_adapter
from tests.helpers import build_stock, randomised
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)

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


def test_from_a_stock_config_under_the_framework_s_own_tool(
    tmp_path, monkeypatch
):
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 2)
    config, weights, _ = side_path_config(
        tmp_path,
        detection_config(tmp_path),
        'neck=dict(in_channels=[32, 64, 128, 256])',
        "custom_hooks = [dict(type='e3va_mm.AdapterCheckpointHook', "
        "save_best='coco/bbox_mAP')]",
    )
    tool = Path(find_spec('mmdet').origin).parent / '.mim/tools/train.py'
    monkeypatch.setattr(sys, 'argv', [str(tool), str(config)])
    runpy.run_path(str(tool), run_name='__main__')
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


def test_the_newest_stay(tmp_path):
    config, _ = config_with(tmp_path, 'max_keep=2')
    runner_of(config, **{'train_cfg.max_iters': 5}).train()
    assert names(tmp_path) == iters(4, 5)


def test_the_interval_and_the_last(tmp_path):
    config, _ = config_with(tmp_path, 'interval=2')
    runner_of(config, **{'train_cfg.max_iters': 5}).train()
    assert names(tmp_path) == iters(2, 4, 5)


def test_files_of_another_run_stay(tmp_path):
    config, _ = config_with(tmp_path, 'max_keep=1')
    (tmp_path / 'work').mkdir()
    other = tmp_path / 'work' / iters(9)[0]
    other.write_text('of yesterday')
    runner_of(config).train()
    assert names(tmp_path) == iters(2, 9)
    assert other.read_text() == 'of yesterday'


def test_resuming_goes_on_with_what_is_kept(tmp_path):
    config, weights = config_with(tmp_path, 'max_keep=2')
    runner_of(config, **{'train_cfg.max_iters': 2}).train()
    runner = runner_of(
        config,
        **{'train_cfg.max_iters': 3},
        resume=True,
        load_from=str(tmp_path / 'work' / 'iter_2.pth'),
    )
    runner.train()
    assert names(tmp_path) == iters(2, 3)
    found = read_adapter(tmp_path / 'work' / iters(3)[0])
    assert found.trunks['backbone.'].source == str(weights)


@pytest.mark.parametrize(
    'hook, best',
    [
        ("save_best='a/mIoU'", 'a_mIoU_iter_3'),
        ("save_best='auto'", 'a_mIoU_iter_3'),
        ("save_best='other', rule='greater'", 'other_iter_2'),
        ("save_best='a/mIoU', rule='less'", 'a_mIoU_iter_2'),
    ],
)
def test_the_best_stays(tmp_path, hook, best):
    config, _ = config_with(
        tmp_path,
        hook,
        'val_cfg = None\nval_dataloader = None\nval_evaluator = None',
    )
    runner = runner_of(config)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, AdapterCheckpointHook))
    for i, score in enumerate([0.3, 0.1, 0.5, 0.5, 0.2]):
        runner.train_loop._iter = i + 1
        hook.after_val_epoch(runner, {'a/mIoU': score, 'other': -score})
    assert names(tmp_path) == [
        f'adapter_best_{best}.safetensors',
        *iters(1, 2),
    ]


def test_a_best_that_no_checkpoint_knows_is_not_forgotten(tmp_path):
    config, _ = config_with(
        tmp_path,
        "save_best='mIoU'",
        'val_cfg = None\nval_dataloader = None\nval_evaluator = None\n'
        'default_hooks = dict(checkpoint=dict(interval=1))',
    )

    def trained(score, **options):
        runner = runner_of(config, **options)
        runner.train()
        (hook,) = (
            h for h in runner.hooks if isinstance(h, AdapterCheckpointHook)
        )
        hook.after_val_epoch(runner, dict(mIoU=score))
        return [n for n in names(tmp_path) if 'best' in n]

    def resumed(score, start, end):
        return trained(
            score,
            **{'train_cfg.max_iters': end},
            resume=True,
            load_from=str(tmp_path / 'work' / f'iter_{start}.pth'),
        )

    best = [f'adapter_best_mIoU_iter_{i}.safetensors' for i in range(5)]
    # Killed after each: no checkpoint follows.
    assert trained(0.5) == [best[2]]
    assert resumed(0.3, 2, 3) == [best[2]]
    assert resumed(0.7, 3, 4) == [best[4]]
    # From before the best there is none of it yet.
    assert resumed(0.6, 2, 3) == [best[3], best[4]]
    # Another run does not have it.
    assert trained(0.1) == [best[2], best[3], best[4]]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    config, _ = config_with(tmp_path)
    part = tmp_path / 'work' / '.adapter_iter_7.safetensors.part'
    part.parent.mkdir()
    part.touch()
    runner_of(config).train()
    assert not part.exists()


def test_a_metric_that_is_none(tmp_path):
    config, _ = config_with(tmp_path, "save_best='mAP'")
    with pytest.raises(ConfigError) as error:
        runner_of(config).train()
    text = str(error.value)
    assert "`save_best` is 'mAP', but evaluation gives aAcc, mIoU" in text


def test_an_average_is_what_is_saved(tmp_path):
    config, _ = config_with(
        tmp_path, more="custom_hooks += [dict(type='EMAHook', momentum=0.3)]"
    )
    runner = runner_of(config)
    runner.train()
    full = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)
    found = read_adapter(tmp_path / 'work' / iters(2)[0]).tensors
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(found[key], full['state_dict'][key])
    assert not torch.equal(found[key], runner.model.state_dict()[key])


def test_a_full_disk_ends_the_run_and_leaves_what_is_there(
    tmp_path, monkeypatch
):
    config, _ = config_with(tmp_path, 'max_keep=1')
    real = os.replace

    def replace(old, new):
        if 'iter_2' in str(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(adapter_file.os, 'replace', replace)
    with pytest.raises(CheckpointError) as error:
        runner_of(config).train()
    text = str(error.value)
    assert str(tmp_path / 'work' / iters(2)[0]) in text
    assert 'MiB of room' in text and 'No space left on device' in text
    assert names(tmp_path) == iters(1)
    read_adapter(tmp_path / 'work' / iters(1)[0])


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    config, _ = config_with(tmp_path)
    for name in (
        'e3va_mm.engine.hooks.adapter_checkpoint_hook.is_main_process',
        'mmengine.dist.utils.is_main_process',
    ):
        monkeypatch.setattr(name, lambda *args: False)
    runner_of(config).train()
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


def test_tools_test_takes_it_without_a_full_checkpoint(tmp_path, capsys):
    config, _ = config_with(tmp_path)
    runner_of(config).train()
    work = tmp_path / 'work'
    rows = []
    for name in ('iter_2.pth', iters(2)[0]):
        assert launch.test([str(config), str(work / name)]) == 0
        rows.append(capsys.readouterr().out.rsplit('mIoU', 1)[1].split()[1])
    assert rows[0] == rows[1]
    full = (work / 'iter_2.pth').stat().st_size
    assert (work / iters(2)[0]).stat().st_size < full / 10


def test_a_random_trunk_is_refused_before_the_first_step(tmp_path):
    config, _ = config_with(tmp_path)
    options = {
        'model.backbone.init_cfg': None,
        'model.backbone.allow_random_trunk': True,
    }
    with pytest.raises(ConfigError, match='but they are random'):
        runner_of(config, **options).train()


def test_a_loop_of_iterations_has_no_epochs(tmp_path):
    config, _ = config_with(tmp_path)
    text = config.read_text().replace('by_epoch=False', 'by_epoch=True')
    config.write_text(text)
    with pytest.raises(ConfigError, match='Set `by_epoch=False`'):
        runner_of(config).train()


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(interval=0), '`interval` should be a whole number from 1 on'),
        (dict(max_keep=1.5), '`max_keep` should be a whole number from 1'),
        (dict(rule='more'), "`rule` should be 'greater' or 'less', but got"),
        (dict(save_best=['a']), 'the name of one metric, or'),
    ],
)
def test_options_that_cannot_work(options, expected):
    with pytest.raises(ConfigError) as error:
        AdapterCheckpointHook(**options)
    assert expected in str(error.value)
