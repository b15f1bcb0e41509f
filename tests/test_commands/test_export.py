import importlib.util
import re

import pytest
import torch

from e3va_mm import export
from e3va_mm.commands import export as command
from e3va_mm.errors import ConfigError
from e3va_mm.weights import read_checkpoint

OUTPUTS = dict(
    detector=[
        *(f'maps_{level}' for level in range(5)),
        *(f'head_{kind}_{level}' for kind in (0, 1) for level in range(5)),
    ],
    segmentor=['logits'],
)


@pytest.fixture(params=OUTPUTS)
def trained(request):
    trained = request.getfixturevalue(request.param)
    return [trained.config, trained.checkpoint, '--out'], request.param


def test_torch_export(trained, tmp_path, monkeypatch, capsys):
    arguments, kind = trained
    names = OUTPUTS[kind]
    kept = []

    def keep(network, inputs, out):
        kept[:] = inputs, export.export_network(network, inputs, out)
        return kept[1]

    monkeypatch.setattr(command, 'export_network', keep)
    out = tmp_path / 'new' / 'network.pt2'
    assert command.main([*arguments, str(out), '--batch', '2']) == 0
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
    assert command.main([*trained[0], f'{tmp_path}/network.onnx']) == 0


def test_a_file_that_differs(segmentor, tmp_path, monkeypatch, capsys):
    # The file is not made: what is tested is the comparison.
    def wrong(network, inputs, out):
        return lambda inputs: {
            name: value + 0.1 * value.abs().max()
            for name, value in network(inputs).items()
        }

    monkeypatch.setattr(command, 'export_network', wrong)
    out = f'{tmp_path}/network.pt2'
    arguments = [segmentor.config, segmentor.adapter, '--out', out]
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.endswith(
        f'error: {out} does not give what the model gives.\n'
    )
    assert command.main([*arguments, '--tolerance', '0.2']) == 0


@pytest.mark.parametrize(
    'left, text',
    [
        (r'backbone\.', 'part.pth does not fit the model of the config, part'),
        (
            r'backbone\.(side_path|norm)|(?!backbone)',
            'part.pth brings no weights for the trunk',
        ),
    ],
)
def test_a_checkpoint_that_leaves_a_part_random(
    segmentor, tmp_path, error, left, text
):
    whole = read_checkpoint(segmentor.checkpoint)
    state = whole['state_dict'].items()
    part = {key: value for key, value in state if re.match(left, key)}
    path = tmp_path / 'part.pth'
    torch.save(dict(meta=whole['meta'], state_dict=part), path)
    assert text in error(command, segmentor.config, path, '--out', 'x.pt2')


def test_onnx_in_16_bits(tmp_path):
    network = torch.nn.Linear(1, 1).to(torch.bfloat16)
    inputs = (torch.zeros(1, 1, dtype=torch.bfloat16),)
    program = torch.export.export(network, inputs)
    with pytest.raises(ConfigError, match=r'x\.onnx: the network computes in'):
        export._export_onnx(program, ['out'], tmp_path / 'x.onnx')


def test_wrong_arguments(segmentor, error):
    good = (segmentor.config, segmentor.checkpoint, '--out', 'x.pt2')
    for arguments, text in (
        (('none.py', *good[1:]), 'none.py: no such config file'),
        ((good[0], 'c.pth', *good[2:]), 'c.pth: no such checkpoint'),
        ((*good[:3], 'x.pth'), '.pt2 (torch.export) or .onnx, but got x'),
        ((*good, '--size', '0', '9'), 'at least 1, but got [0, 9] and 1'),
        ((*good, '--batch', '0'), 'at least 1, but got None and 0'),
    ):
        assert text in error(command, *arguments)


def test_missing_packages(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'onnxscript' else find(name),
    )
    monkeypatch.setattr(export, 'ONNX_PACKAGES', ('onnxscript', 'torch'))
    with pytest.raises(ConfigError, match='`pip install onnxscript`'):
        export.check_out(tmp_path / 'x.onnx')


def test_another_model():
    with pytest.raises(ConfigError, match='dense head or an RPN, but got Li'):
        export.Network(torch.nn.Linear(1, 1))
