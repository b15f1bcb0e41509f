"""The command that takes a step of every stock config."""

import importlib.util
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.trunk_cases import build_ours

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'stock_configs.py'
TINY = """
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'
model = dict(
    backbone=dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    neck=dict(in_channels={}, out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
"""
# Of other families: a stock config, and what makes it small.
SMALL = {
    'MixVisionTransformer': (
        'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        'model = dict(backbone=dict(num_layers=[1, 1, 1, 1]))',
    ),
    'BEiT': (
        'beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py',
        'model = dict(backbone=dict(img_size=(64, 64), embed_dims=32, '
        'num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3)), '
        'neck=dict(embed_dim=32), '
        'decode_head=dict(in_channels=[32, 32, 32, 32], channels=8), '
        'auxiliary_head=dict(in_channels=32, channels=8))',
    ),
    'ConvNeXt': (
        'convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
        "model = dict(backbone=dict(arch='atto'), "
        'decode_head=dict(in_channels=[40, 80, 160, 320], channels=8), '
        'auxiliary_head=dict(in_channels=160, channels=8))',
    ),
}


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
    paths = list(benchmark.stock_configs(framework, ['SwinTransformer']))
    assert len(paths) == count
    for path in paths:
        model = benchmark.parse(path).model
        assert model.backbone.type == 'SwinTransformer'
        assert 'language_model' not in model
        assert benchmark.label(path).startswith(f'{framework}::')


def test_those_with_a_language_model(benchmark, tmp_path):
    found = Counter()
    steps = set()
    for path in benchmark.stock_configs('mmdet', ['SwinTransformer'], True):
        config = benchmark.parse(path)
        found[benchmark.heading(config.model)] += 1
        steps.add(benchmark.trains_by(config))
    assert found == dict(GroundingDINO=54, GLIP=21)
    assert len(steps) < 36  # the others differ in data and tests alone
    pytest.importorskip('transformers')
    from transformers import AutoTokenizer, BertConfig

    folder = benchmark.stand_in(str(tmp_path))
    assert BertConfig.from_pretrained(folder).hidden_size == 768
    tokens = AutoTokenizer.from_pretrained(folder).tokenize('a. b. z.')
    assert tokens == ['a', '.', 'b', '.', 'z', '.']


@pytest.mark.parametrize(
    'framework, counts',
    [
        (
            'mmdet',
            dict(
                PyramidVisionTransformer=4,
                PyramidVisionTransformerV2=6,
                ConvNeXt=4,
            ),
        ),
        (
            'mmseg',
            dict(
                VisionTransformer=30,
                BEiT=4,
                MAE=2,
                MixVisionTransformer=13,
                PCPVT=6,
                SVT=6,
                MSCAN=4,
                ConvNeXt=6,
                PoolFormer=5,
            ),
        ),
    ],
)
def test_all_of_the_other_families(benchmark, framework, counts):
    pytest.importorskip('mmpretrain')
    others = set(benchmark.FAMILIES) - {'SwinTransformer'}
    found = Counter()
    for path in benchmark.stock_configs(framework, others):
        model = benchmark.parse(path).model
        found[benchmark.family_of(model)] += 1
        name, stock = benchmark.backbone_of(model)
        stock = dict(stock)
        benchmark.change(model, framework)
        ours = dict(model[name])
        assert ours.pop('tuner') == dict(type='E3VA')
        kind = stock.pop('type')
        scoped = kind if '.' in kind else f'{framework}.{kind}'
        if ours.pop('type') == 'e3va_mm.E3VAVisionTransformer':
            assert ours == dict(stock, trunk_type=scoped)
        else:
            assert ours == dict(trunk=dict(stock, type=scoped))
    assert found == counts


@pytest.mark.parametrize('family', SMALL)
def test_other_families_take_a_step(benchmark, tmp_path, family):
    if family == 'ConvNeXt':
        pytest.importorskip('mmpretrain')
    stock, small = SMALL[family]
    path = tmp_path / 'config.py'
    base = str(benchmark.root('mmseg') / stock)
    path.write_text(f'_base_ = {base!r}\n{small}\n')
    # BEiT is made for 64.
    size = 128 if family == 'BEiT' else 64
    figures = benchmark.one_step(path, size, 2)
    assert figures['seconds'] > 0
    assert figures['parameters']['trainable_backbone'] > 0


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


def test_batch_norms_of_a_random_trunk_get_statistics(benchmark):
    torch.manual_seed(0)
    ours = build_ours('mscan')
    images = 5 + 3 * torch.randn(2, 3, 64, 64)
    seen = {}

    def look(module, args):
        seen[module] = args[0]

    norms = {
        name: module
        for name, module in ours.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    }
    handles = [m.register_forward_pre_hook(look) for m in norms.values()]
    benchmark.give_statistics(ours, images)
    for handle in handles:
        handle.remove()
    assert seen
    for module, value in seen.items():
        assert not module.training
        mean = value.mean((0, 2, 3))
        assert torch.allclose(module.running_mean, mean, atol=1e-5)


def test_figures_of_several_families_are_summed_up(benchmark):
    done = dict(parameters=dict(trainable=2, trainable_backbone=1))
    rows = dict(
        a=dict(done, family='BEiT', seconds=2.0),
        b=dict(done, family='BEiT', seconds=1.0),
        c=dict(family='BEiT', error='TypeError: a | b'),
        d=dict(family='PoolFormer'),
    )
    lines = benchmark.table(rows).splitlines()
    assert '| c | - | - | - | TypeError: a \\| b |' in lines
    assert '| d | - | - | - | not yet |' in lines
    assert lines[-6:] == [
        '| backbone | reached | CPU s/step |',
        '|---|---:|---:|',
        '| BEiT | 2 of 3 | 1.0-2.0 |',
        '| PoolFormer | 0 of 1 | - |',
        '',
        '2 of 4 reached',
    ]


def test_adapters_that_stay_are_an_error(benchmark, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        TINY.format([64, 128, 256]) + 'optim_wrapper = dict('
        'optimizer=dict(lr=0.0, weight_decay=0.0, momentum=0.0))\n'
    )
    found = benchmark.in_a_process(benchmark.one_step, path, 64, 2)
    assert list(found) == ['error']
    assert found['error'].startswith('AssertionError: backbone.side_path.')
    assert found['error'].endswith('up.q has not moved')


def test_a_killed_process_is_one_that_failed(benchmark):
    found = benchmark.in_a_process(_die)
    assert 'ended with -9;' in found['error']


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
