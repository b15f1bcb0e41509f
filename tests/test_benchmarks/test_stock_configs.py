"""The command that takes a step of every stock Swin config."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'stock_configs.py'
TINY = """
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'
model = dict(
    backbone=dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    neck=dict(in_channels={}, out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
"""


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('framework, count', [('mmdet', 25), ('mmseg', 23)])
def test_all_stock_configs_without_a_language_model(
    benchmark, framework, count
):
    paths = list(benchmark.stock_configs(framework))
    assert len(paths) == count
    for path in paths:
        model = benchmark.parse(path).model
        assert model.backbone.type == 'SwinTransformer'
        assert 'language_model' not in model
        assert benchmark.label(path).startswith(f'{framework}::')


def test_command(benchmark, tmp_path, capsys):
    good, bad = tmp_path / 'good.py', tmp_path / 'bad.py'
    good.write_text(TINY.format([64, 128, 256]))
    bad.write_text(TINY.format([64, 128, 255]))
    target = tmp_path / 'figures.json'
    command = [str(good), str(bad), '--size=64', f'--json={target}']
    benchmark.main(command)
    printed = capsys.readouterr().out
    assert printed.endswith('\n1 of 2 reached\n')
    first = json.loads(target.read_text())['variants']
    count = first[str(good)]['parameters']
    assert 0 < count['trainable_backbone'] < count['trainable']
    assert (
        f'| {good} | {first[str(good)]["seconds"]:.1f} '
        f'| {count["trainable"]:,} | {count["trainable_backbone"]:,} | |'
    ) in printed
    assert 'RuntimeError' in first[str(bad)]['error']
    assert f'| {bad} | - | - | - | {first[str(bad)]["error"]} |' in printed

    # What was reached is kept, what failed is tried again.
    bad.write_text(good.read_text())
    benchmark.main(command)
    second = json.loads(target.read_text())['variants']
    assert second[str(good)] == first[str(good)]
    assert 'error' not in second[str(bad)]
    assert capsys.readouterr().out.endswith('\n2 of 2 reached\n')


def test_adapters_that_stay_are_an_error(benchmark, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        TINY.format([64, 128, 256]) + 'optim_wrapper = dict('
        'optimizer=dict(lr=0.0, weight_decay=0.0, momentum=0.0))\n'
    )
    found = benchmark.in_a_process(benchmark.one_step, path, 64, 2)
    assert list(found) == ['error']
    assert found['error'].startswith('AssertionError: side_path.')
    assert found['error'].endswith('up.q has not moved')


def test_a_killed_process_is_one_that_failed(benchmark):
    found = benchmark.in_a_process(_die)
    assert 'ended with -9;' in found['error']


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
