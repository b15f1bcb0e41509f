import importlib.util
import re
from pathlib import Path

import pytest
import torch

from e3va_mm import export
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.weights import read_checkpoint
from tests.test_apis.trained import trained_detector, trained_segmentor

SPEC = importlib.util.spec_from_file_location(
    'export', Path(__file__).parents[2] / 'tools' / 'export.py'
)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

OUTPUTS = dict(
    detector=[
        *(f'maps_{level}' for level in range(5)),
        *(f'head_{kind}_{level}' for kind in (0, 1) for level in range(5)),
    ],
    segmentor=['logits'],
)


@pytest.fixture(scope='module', params=['detector', 'segmentor'])
def trained(request, tmp_path_factory):
    make = dict(detector=trained_detector, segmentor=trained_segmentor)
    folder = tmp_path_factory.mktemp(request.param)
    return make[request.param](folder), OUTPUTS[request.param]


def exported(trained, out, *arguments):
    return tool.main(
        [trained.config, trained.checkpoint, '--out', str(out), *arguments]
    )


def test_torch_export(trained, tmp_path, monkeypatch, capsys):
    trained, names = trained
    kept = []

    def keep(network, inputs, out):
        kept[:] = inputs, export.export_network(network, inputs, out)
        return kept[1]

    monkeypatch.setattr(tool, 'export_network', keep)
    out = tmp_path / 'new' / 'network.pt2'
    assert exported(trained, out, '--batch', '2') == 0
    assert out.is_file()
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        assert any(line.startswith(f'{name}: (2, ') for line in lines)
    assert 'largest difference' in lines[-1]
    # What the check rests on: other inputs give other outputs.
    inputs, run = kept
    with torch.no_grad():
        found, other = run(inputs), run(torch.zeros_like(inputs))
    assert list(found) == names
    assert not torch.allclose(found[names[0]], other[names[0]])


def test_onnx(trained, tmp_path):
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name)  # of the extra `export`, not of `tests`
    assert exported(trained[0], tmp_path / 'network.onnx') == 0


def test_a_file_that_differs(trained, tmp_path, monkeypatch, capsys):
    # The file is not made: what is tested is the comparison.
    def wrong(network, inputs, out):
        return lambda inputs: {
            name: value + 0.1 * value.abs().max()
            for name, value in network(inputs).items()
        }

    monkeypatch.setattr(tool, 'export_network', wrong)
    out = tmp_path / 'network.pt2'
    assert exported(trained[0], out) == 1
    assert capsys.readouterr().err == (
        f'error: {out} does not give what the model gives.\n'
    )
    assert exported(trained[0], out, '--tolerance', '0.2') == 0


def test_a_checkpoint_that_leaves_a_part_random(trained, tmp_path):
    trained, _ = trained
    whole = read_checkpoint(trained.checkpoint)
    state = whole['state_dict']
    path = tmp_path / 'part.pth'
    for left, text in (
        (
            r'backbone\.',
            r'part\.pth does not fit the model of the config: 0 of',
        ),
        (
            r'backbone\.(side_path|norm)|(?!backbone)',
            r'part\.pth brings no weights for the trunk',
        ),
    ):
        part = {k: v for k, v in state.items() if re.match(left, k)}
        torch.save(dict(meta=whole['meta'], state_dict=part), path)
        with pytest.raises(CheckpointError, match=text):
            tool.main([trained.config, str(path), '--out', 'x.pt2'])


def test_onnx_in_16_bits(tmp_path):
    network = torch.nn.Linear(1, 1).to(torch.bfloat16)
    inputs = (torch.zeros(1, 1, dtype=torch.bfloat16),)
    program = torch.export.export(network, inputs)
    with pytest.raises(ConfigError, match=r'x\.onnx: the network computes in'):
        export._export_onnx(program, ['out'], tmp_path / 'x.onnx')


def test_wrong_arguments(tmp_path):
    config, checkpoint = tmp_path / 'c.py', tmp_path / 'c.pth'
    with pytest.raises(ConfigError, match=r'c\.py: no such config file'):
        tool.main([str(config), str(checkpoint), '--out', 'x.pt2'])
    config.write_text('')
    with pytest.raises(RuntimeError, match=r'c\.pth: no such checkpoint'):
        tool.main([str(config), str(checkpoint), '--out', 'x.pt2'])
    checkpoint.write_text('')
    good = [str(config), str(checkpoint), '--out', 'x.pt2']
    for arguments, text in (
        (['--out', 'x.pth'], r'\.pt2 \(torch\.export\) or \.onnx, but got x'),
        (['--size', '0', '9'], 'at least 1 1, but got 0 9'),
        (['--batch', '0'], 'at least 1, but got 0'),
        (['--size', '9', '9'], r"'mmdet' or 'mmseg', but got None"),
    ):
        with pytest.raises(ConfigError, match=text):
            tool.main([*good, *arguments])


def test_missing_packages(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'onnxscript' else find(name),
    )
    monkeypatch.setattr(export, 'ONNX_PACKAGES', ('onnxscript', 'torch'))
    with pytest.raises(ConfigError) as error:
        export.check_out(tmp_path / 'x.onnx')
    assert str(error.value) == (
        f'{tmp_path}/x.onnx: ONNX needs onnxscript, which is not installed: '
        '`pip install onnxscript`. Or write a .pt2 file.'
    )


def test_another_model():
    with pytest.raises(ConfigError, match='dense head or an RPN, but got Li'):
        export.Network(torch.nn.Linear(1, 1))
