"""The proof with a card: tried on a CPU, with small sizes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'gpu.py'
SPEC = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
gpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a part of made rows."""

    def run(rows, until=float('inf'), part='numerics'):
        monkeypatch.setitem(gpu.PARTS, part, lambda size, device: rows)
        return gpu.run_part(part, 'small', 'cpu', tmp_path, until)

    return run


def figures(folder, part='numerics'):
    return json.loads((folder / f'{part}.json').read_text())['variants']


def fail():
    raise torch.cuda.OutOfMemoryError('too | large')


def test_what_is_there_is_not_measured_again(run, tmp_path):
    assert run(dict(a=lambda: dict(ms=1.5), b=fail))
    found = figures(tmp_path)
    assert found['a']['ms'] == 1.5
    assert found['b']['error'] == 'OutOfMemoryError: too | large'
    assert run(dict(a=fail, b=lambda: dict(ms=1234.5), c=fail))
    again = figures(tmp_path)
    assert again['a'] == found['a'] and 'error' not in again['b']
    gpu.write_table(tmp_path)
    table = (tmp_path / 'table.md').read_text()
    assert '| a | 1.5 |' in table and '| b | 1,234 |' in table
    assert 'OutOfMemoryError: too / large' in table
    assert '## steps\n\nNot measured.' in table


def test_out_of_time_the_rest_is_left_to_the_next_run(run, tmp_path, capsys):
    assert run(dict(a=lambda: dict(ms=1.0)), until=0)
    assert not (tmp_path / 'numerics.json').exists()
    assert 'out of time before "a"; rerun to go on' in capsys.readouterr().out


def test_an_unsound_row_fails_the_part(run):
    assert not run(dict(a=lambda: dict(sound=False)))


def test_detectors_need_operators(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'mmcv.ops', None)
    assert run(dict(a=fail), part='steps')
    assert (
        'steps: left out, it needs whole detectors' in capsys.readouterr().out
    )


@pytest.mark.parametrize('preset', gpu.PRESETS)
def test_numerics_beside_the_cpu(preset):
    row = gpu.numerics(preset, 'bf16', 'small', 'cpu')
    assert row['sound'] and 0 <= row['error'] < 0.1


def test_wrong_numerics_are_found(monkeypatch):
    right, calls = gpu.results, []

    def wrong(model, image):
        calls.append(model)
        outputs, gradients = right(model, image)
        return outputs * len(calls), gradients

    monkeypatch.setattr(gpu, 'results', wrong)
    row = gpu.numerics('exact', 'bf16', 'small', 'cpu')
    assert not row['sound'] and row['error'] == pytest.approx(1, rel=0.1)


def test_a_step_has_all_figures():
    workload = gpu.SIZES['small']['steps']['w2']
    row = gpu.step_row(*workload, 'exact', 'AMP', 'cpu')
    assert {'peak MiB', 'ms', 'model, host ms', 'model, A100 ms'} < set(row)
    assert row['kernels'] < row['ops']


def test_modelled_steps_of_the_stock_backbone():
    frozen = gpu.modelled('small')
    full = gpu.modelled('small', trains=True)
    assert full['kernels'] > 1.9 * frozen['kernels']
    # So small a map is a matter of launches, on any card.
    assert full['T4 GPU ms'] == pytest.approx(3e-3 * full['kernels'])
    host = 3e-3 * full['kernels'] + 4e-3 * full['ops']
    assert full['host ms'] == pytest.approx(host)


def test_the_trunk_as_it_is():
    row = gpu.compiled(gpu.eager, False, 'small', 'cpu')
    assert row['error'] == 0 < row['ms']


@pytest.mark.parametrize(
    'name, card',
    [
        ('NVIDIA GeForce GTX 1080 Ti', '1080Ti'),
        ('NVIDIA A100-SXM4-80GB', 'A100'),
        ('NVIDIA L4', 'L4'),
        ('NVIDIA L40S', 'A100'),
    ],
)
def test_cards_are_known_by_their_names(name, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert gpu.card_of('cuda') == card
