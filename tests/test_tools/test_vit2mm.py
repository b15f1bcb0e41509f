"""The converter of ViT files, as it is called."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.weights import VIT_TARGETS, read_checkpoint, to_vit_keys
from tests.test_weights.hostile import FORMS, touch

TOOL = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'vit2mm.py'
TARGET = 'mmpretrain.VisionTransformer'


def weights():
    """One block with the names of official files; one storage for all."""
    torch.manual_seed(0)
    values = torch.randn(1000)
    return {
        'cls_token': values[:8].view(1, 1, 8),
        'patch_embed.proj.weight': torch.randn(8, 3, 2, 2),
        'blocks.0.attn.qkv.weight': values[8:200].view(24, 8),
        'blocks.0.norm1.weight': values[200:208],
        'mask_token': values[:8].view(1, 8),
    }


@pytest.fixture(scope='module')
def convert():
    spec = importlib.util.spec_from_file_location('vit2mm', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([*map(str, arguments)])


@pytest.fixture
def source(tmp_path):
    path = tmp_path / 'official.pth'
    torch.save({'model': weights(), 'epoch': 3}, path)
    return path


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_what_is_written(convert, source, tmp_path, suffix, capsys):
    out = tmp_path / 'new' / f'stock{suffix}'
    convert(source, out, '--to', TARGET)
    assert capsys.readouterr().out == (
        f'{out}: 5 tensors for {TARGET} (format of the file: official '
        'or timm ViT)\n'
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    # Not all of the memory that a tensor was a part of.
    assert out.stat().st_size < 6000
    expected, _ = to_vit_keys(weights(), TARGET)
    found = read_checkpoint(out)['state_dict']
    assert found.keys() == expected.keys()
    assert 'layers.0.ln1.weight' in found
    assert all(torch.equal(found[key], expected[key]) for key in found)
    # A stock file by now, which replaces another.
    again = tmp_path / 'again.pth'
    again.write_text('old')
    convert(out, again, '--to', TARGET)
    assert '(format of the file: MM backbone)' in capsys.readouterr().out
    assert 'layers.0.ln1.weight' in read_checkpoint(again)['state_dict']


def test_the_source_is_not_overwritten(convert, source, tmp_path):
    before = source.read_bytes()
    link = tmp_path / 'link.pth'
    link.symlink_to(source)
    text = '^DST should be another file than SRC, but both are '
    for out in (source, link):
        with pytest.raises(ConfigError, match=f'{text}{out}'):
            convert(source, out, '--to', TARGET)
    assert source.read_bytes() == before


def test_what_cannot_be_converted_leaves_nothing(convert, tmp_path, capsys):
    source, out = tmp_path / 'other.pth', tmp_path / 'stock.pth'
    torch.save({'conv1.weight': torch.zeros(1)}, source)
    with pytest.raises(ConfigError, match='end with .pth or .safetensors'):
        convert(source, tmp_path / 'stock.bin', '--to', TARGET)
    with pytest.raises(E3VAError, match=f'no weights that {TARGET} takes'):
        convert(source, out, '--to', TARGET)
    with pytest.raises(E3VAError, match='does not exist'):
        convert(tmp_path / 'no.pth', out, '--to', TARGET)
    with pytest.raises(SystemExit):
        convert(source, out, '--to', 'mmdet.ViT')
    error = capsys.readouterr().err
    assert all(target in error for target in VIT_TARGETS)
    assert [path.name for path in tmp_path.iterdir()] == ['other.pth']


def test_a_hostile_file_does_not_run(tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_meta'](path, touch(marker))
    command = [sys.executable, TOOL, path, tmp_path / 'x.pth', '--to', TARGET]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith('error: ')
    assert 'it could run code and was not read' in last
    assert not marker.exists()
