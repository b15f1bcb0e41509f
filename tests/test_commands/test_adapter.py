import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from e3va_mm.commands import adapter, test
from e3va_mm.weights import read_adapter, read_checkpoint
from tests.helpers import TINY


@pytest.fixture
def run(capsys):
    """Run the command; what it prints."""

    def run(*arguments):
        assert adapter.main([str(each) for each in arguments]) == 0
        return capsys.readouterr().out

    return run


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_extract_gives_what_the_hook_writes(segmentor, tmp_path, run):
    out = tmp_path / 'out.safetensors'
    full, config = segmentor.checkpoint, segmentor.config
    last = run('extract', full, out, '--config', config).splitlines()[-1]
    assert last.startswith(f'{out}: 0.') and last.endswith(' MiB')
    found, expected = read_adapter(out), read_adapter(segmentor.adapter)
    assert_same(found.tensors, expected.tensors)
    assert found.trunks == expected.trunks
    assert found.trainable == expected.trainable
    assert found.dataset_meta == expected.dataset_meta


def test_extract_with_the_trunk_s_file(segmentor, tmp_path, run):
    out, moved = tmp_path / 'out.safetensors', tmp_path / 'trunk.safetensors'
    shutil.copy(segmentor.trunk, moved)
    missing = 'model.backbone.init_cfg.checkpoint=none.pth'
    run(
        *('extract', segmentor.checkpoint, out, '--config', segmentor.config),
        *('--trunk', moved, '--cfg-options', missing),
    )
    assert read_adapter(out).trunks['backbone.'].source == str(moved)


@pytest.mark.parametrize('name', ['another trunk', 'no head'])
def test_extract_of_what_does_not_fit(segmentor, tmp_path, error, name):
    checkpoint = read_checkpoint(segmentor.checkpoint)
    if name == 'no head':
        del checkpoint['state_dict']['decode_head.conv_seg.bias']
        expected = 'would be random: decode_head.conv_seg.bias is missing.'
    else:
        checkpoint['state_dict']['backbone.patch_embed.projection.weight'] += 1
        expected = '--trunk PATH_OR_URL'
    path, out = tmp_path / 'x.pth', tmp_path / 'x.safetensors'
    torch.save(checkpoint, path)
    arguments = ('extract', path, out, '--config', segmentor.config)
    assert expected in error(adapter, *arguments)
    assert not out.exists()


def test_merge_gives_the_full_checkpoint(segmentor, tmp_path, run):
    out = tmp_path / 'merged.pth'
    text = run('merge', segmentor.config, segmentor.adapter, out)
    assert 'A stock model that loads it leaves out' in text
    merged = read_checkpoint(out)
    full = read_checkpoint(segmentor.checkpoint)
    assert_same(merged['state_dict'], full['state_dict'])
    meta = merged['meta']['dataset_meta']
    assert meta['classes'] == ('cat', 'dog', 'bird')
    assert test.main([segmentor.config, str(out)]) == 0

    # A stock model takes the merged file.
    config = Config.fromfile(segmentor.config)
    init_default_scope('mmseg')
    config.model.backbone = dict(type='mmseg.SwinTransformer', **TINY)
    stock = MODELS.build(config.model)
    load_checkpoint(stock, str(out))
    state = stock.state_dict()
    for key, value in state.items():
        assert torch.equal(value, merged['state_dict'][key]), key
    left = merged['state_dict'].keys() - state.keys()
    assert all(key.startswith('backbone.side_path.') for key in left)


def test_strip_keeps_the_backbone(segmentor, tmp_path, run, error):
    out = tmp_path / 'part.safetensors'
    run('strip', segmentor.adapter, out)
    found = read_adapter(out)
    assert found.part == 'backbone'
    assert found.tensors
    assert all(key.startswith('backbone.') for key in found.tensors)
    # Another task starts from it, with another head.
    config = Config.fromfile(segmentor.config)
    init_default_scope('mmseg')
    config.model.decode_head.num_classes = 7
    model = MODELS.build(config.model)
    load_checkpoint(model, str(out))
    state = model.state_dict()
    for key, value in found.tensors.items():
        assert torch.equal(state[key], value), key
    arguments = ('merge', segmentor.config, out, tmp_path / 'merged.pth')
    assert 'holds no neck and heads' in error(adapter, *arguments)


def test_inspect(segmentor, run):
    text = run('inspect', segmentor.adapter)
    found = read_adapter(segmentor.adapter)
    for part in ('backbone.side_path', 'backbone.norm0', 'decode_head'):
        assert part in text
    total = sum(value.numel() for value in found.tensors.values())
    assert f'{total:,}' in text
    assert f'trunk of backbone.: {segmentor.trunk}' in text
    assert found.trunks['backbone.'].fingerprint in text
    assert 'classes: ["cat", "dog", "bird"]' in text
    text = run('inspect', segmentor.adapter, '--config')
    assert text.strip() == found.config.strip()


def test_inspect_a_file_of_the_package(run):
    name = 'retinanet_e3va_swin_nano_digits.safetensors'
    assert 'holds: model' in run('inspect', f'e3va_mm://{name}')


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (
            'extract {checkpoint} a.pth --config {config}',
            'OUT should end in .safetensors, but got a.pth',
        ),
        (
            'extract {checkpoint} a.safetensors --config no.py',
            'no.py: no such config file',
        ),
        (
            'extract no.pth a.safetensors --config {config}',
            'no.pth: no such checkpoint file',
        ),
        (
            'merge {config} {adapter} a.safetensors',
            'OUT should end in .pth, but got a.safetensors',
        ),
        ('inspect {checkpoint}', 'is no adapter file'),
        ('strip {checkpoint} a.safetensors', 'no adapter'),
    ],
)
def test_what_is_refused(segmentor, error, arguments, expected):
    assert expected in error(
        adapter, *arguments.format(**segmentor._asdict()).split()
    )
