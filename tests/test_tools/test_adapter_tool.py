import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from e3va_mm.commands import launch
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.weights import read_adapter, read_checkpoint
from tests.helpers import TINY
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

SPEC = importlib.util.spec_from_file_location(
    'adapter', Path(__file__).parents[2] / 'tools' / 'adapter.py'
)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Config, full checkpoint, adapter file of the hook, trunk's file."""
    folder = tmp_path_factory.mktemp('segmentor')
    make_segmentation(folder)
    config, weights, _ = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=3, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None",
        'custom_hooks = ['
        "dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False)]",
    )
    assert launch.train([str(config)]) == 0
    work = folder / 'work'
    adapter = work / 'adapter_iter_2.safetensors'
    return config, work / 'iter_2.pth', adapter, weights


def run(*arguments):
    tool.main([str(each) for each in arguments])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_extract_gives_what_the_hook_writes(trained, tmp_path, capsys):
    config, full, adapter, _ = trained
    out = tmp_path / 'out.safetensors'
    run('extract', full, out, '--config', config)
    found, expected = read_adapter(out), read_adapter(adapter)
    assert_same(found.tensors, expected.tensors)
    assert found.trunks == expected.trunks
    assert found.trainable == expected.trainable
    assert found.dataset_meta == expected.dataset_meta
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f'{out}: 0.') and last.endswith(' MiB')


def test_extract_with_the_trunk_s_file(trained, tmp_path):
    config, full, adapter, weights = trained
    out, moved = tmp_path / 'out.safetensors', tmp_path / 'trunk.safetensors'
    shutil.copy(weights, moved)
    missing = 'model.backbone.init_cfg.checkpoint=none.pth'
    run(
        *('extract', full, out, '--config', config),
        *('--trunk', moved, '--cfg-options', missing),
    )
    assert read_adapter(out).trunks['backbone.'].source == str(moved)


def test_extract_of_another_trunk_is_refused(trained, tmp_path):
    config, full, _, _ = trained
    checkpoint = read_checkpoint(full)
    name = 'backbone.patch_embed.projection.weight'
    checkpoint['state_dict'][name] += 1
    other = tmp_path / 'other.pth'
    torch.save(checkpoint, other)
    with pytest.raises(ConfigError) as error:
        run('extract', other, tmp_path / 'o.safetensors', '--config', config)
    text = str(error.value)
    assert 'but they are of a checkpoint' in text
    assert '--trunk PATH_OR_URL' in text
    assert not (tmp_path / 'o.safetensors').exists()


def test_extract_of_what_lacks_a_head_is_refused(trained, tmp_path):
    config, full, _, _ = trained
    checkpoint = read_checkpoint(full)
    del checkpoint['state_dict']['decode_head.conv_seg.bias']
    torch.save(checkpoint, tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        run(
            *('extract', tmp_path / 'part.pth', tmp_path / 'o.safetensors'),
            *('--config', config),
        )


def test_merge_gives_the_full_checkpoint(trained, tmp_path, capsys):
    config, full, adapter, _ = trained
    out = tmp_path / 'merged.pth'
    run('merge', config, adapter, out)
    assert 'A stock model that loads it leaves out' in capsys.readouterr().out
    merged, expected = read_checkpoint(out), read_checkpoint(full)
    assert_same(merged['state_dict'], expected['state_dict'])
    meta = merged['meta']['dataset_meta']
    assert meta['classes'] == ('cat', 'dog', 'bird')
    assert launch.test([str(config), str(out)]) == 0


def test_a_stock_model_takes_the_merged_file(trained, tmp_path):
    config, _, adapter, _ = trained
    out = tmp_path / 'merged.pth'
    run('merge', config, adapter, out)
    config = Config.fromfile(config)
    init_default_scope('mmseg')
    config.model.backbone = dict(type='mmseg.SwinTransformer', **TINY)
    stock = MODELS.build(config.model)
    load_checkpoint(stock, str(out))
    merged = read_checkpoint(out)['state_dict']
    for key, value in stock.state_dict().items():
        assert torch.equal(value, merged[key]), key
    left = merged.keys() - stock.state_dict().keys()
    assert all(key.startswith('backbone.side_path.') for key in left)


def test_strip_keeps_the_backbone(trained, tmp_path):
    config, _, adapter, _ = trained
    out = tmp_path / 'part.safetensors'
    run('strip', adapter, out)
    found = read_adapter(out)
    assert found.part == 'backbone'
    assert found.tensors
    assert all(key.startswith('backbone.') for key in found.tensors)
    # Another task starts from it, with another head.
    config = Config.fromfile(config)
    init_default_scope('mmseg')
    config.model.decode_head.num_classes = 7
    model = MODELS.build(config.model)
    load_checkpoint(model, str(out))
    state = model.state_dict()
    for key, value in found.tensors.items():
        assert torch.equal(state[key], value), key
    with pytest.raises(CheckpointError, match='holds no neck and heads'):
        run('merge', trained[0], out, tmp_path / 'merged.pth')


def test_inspect(trained, capsys):
    _, _, adapter, weights = trained
    run('inspect', adapter)
    text = capsys.readouterr().out
    found = read_adapter(adapter)
    for part in ('backbone.side_path', 'backbone.norm0', 'decode_head'):
        assert part in text
    total = sum(value.numel() for value in found.tensors.values())
    assert f'{total:,}' in text
    assert f'trunk of backbone.: {weights}' in text
    assert found.trunks['backbone.'].fingerprint in text
    assert 'classes: ["cat", "dog", "bird"]' in text
    run('inspect', adapter, '--config')
    assert capsys.readouterr().out.strip() == found.config.strip()


@pytest.mark.parametrize(
    'arguments, error, expected',
    [
        (
            ('extract', '{full}', 'a.pth', '--config', '{config}'),
            ConfigError,
            'OUT should end in .safetensors, but got a.pth',
        ),
        (
            ('extract', '{full}', 'a.safetensors', '--config', 'no.py'),
            ConfigError,
            'no.py: no such config file',
        ),
        (
            ('extract', 'no.pth', 'a.safetensors', '--config', '{config}'),
            CheckpointError,
            'no.pth does not exist',
        ),
        (
            ('merge', '{config}', '{adapter}', 'a.safetensors'),
            ConfigError,
            'OUT should end in .pth, but got a.safetensors',
        ),
        (('inspect', '{full}'), CheckpointError, 'is no adapter file'),
        (('strip', '{full}', 'a.safetensors'), CheckpointError, 'no adapter'),
    ],
)
def test_what_cannot_be_had(trained, arguments, error, expected):
    config, full, adapter, _ = trained
    names = dict(config=config, full=full, adapter=adapter)
    with pytest.raises(error) as raised:
        run(*(each.format(**names) for each in arguments))
    assert expected in str(raised.value)
