"""The converter of ViT files, as it is called."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(*arguments):
    """The one line of an error."""
    process = run(*arguments)
    assert process.returncode == 1, process.stderr
    assert 'Traceback' not in process.stderr
    return process.stderr.splitlines()[-1]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / 'official.pth'
    torch.save({'model': weights(), 'epoch': 3}, path)
    return path


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_what_is_written(source, tmp_path, suffix):
    out = tmp_path / 'new' / f'stock{suffix}'
    process = run(source, out, '--to', TARGET)
    assert process.returncode == 0, process.stderr
    assert process.stdout == (
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
    # A stock file by now.
    again = run(out, tmp_path / 'again.pth', '--to', TARGET)
    assert '(format of the file: MM backbone)' in again.stdout


def test_safetensors_are_read_and_a_file_is_replaced(tmp_path):
    source, out = tmp_path / 'official.safetensors', tmp_path / 'stock.pth'
    state = {key: value.clone() for key, value in weights().items()}
    save_file(state, source)
    out.write_text('old')
    assert run(source, out, '--to', TARGET).returncode == 0
    assert 'layers.0.ln1.weight' in read_checkpoint(out)['state_dict']


def test_the_source_is_not_overwritten(source, tmp_path):
    before = source.read_bytes()
    link = tmp_path / 'link.pth'
    link.symlink_to(source)
    for out in (source, link):
        assert refusal(source, out, '--to', TARGET) == (
            f'error: DST should be another file than SRC, but both are {out}. '
            'SRC is not overwritten; give another name.'
        )
    assert source.read_bytes() == before


def test_another_suffix_is_refused(source, tmp_path):
    out = tmp_path / 'stock.bin'
    assert refusal(source, out, '--to', TARGET) == (
        f'error: DST should end with .pth or .safetensors, but got {out}.'
    )


def test_an_unknown_target_is_refused(source, tmp_path):
    process = run(source, tmp_path / 'stock.pth', '--to', 'mmdet.ViT')
    assert process.returncode == 2
    assert "invalid choice: 'mmdet.ViT'" in process.stderr
    assert all(target in process.stderr for target in VIT_TARGETS)
    assert not (tmp_path / 'stock.pth').exists()


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    source, out = tmp_path / 'other.pth', tmp_path / 'stock.pth'
    torch.save({'conv1.weight': torch.zeros(1)}, source)
    text = refusal(source, out, '--to', TARGET)
    assert text.startswith(f'error: These are no weights that {TARGET} takes')
    assert 'does not exist' in refusal(
        tmp_path / 'no.pth', out, '--to', TARGET
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ['other.pth']


def test_a_hostile_file_does_not_run(tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_meta'](path, touch(marker))
    text = refusal(path, tmp_path / 'stock.pth', '--to', TARGET)
    assert 'it could run code and was not read' in text
    assert not marker.exists()
