"""What the doctor sees, and how it says it."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from e3va_mm.commands import doctor
from e3va_mm.doctor import report
from e3va_mm.doctor.snapshot import PACKAGES, findable, probe
from tests.test_doctor.test_checks import CASES, GPU, NOTES, snapshot

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    'seen, status, end',
    [
        (snapshot(cuda='12.6', devices=GPU), 0, '\nNothing is wrong.\n'),
        (CASES['an old torch'][0], 1, "pip install --upgrade 'torch>=2.6'\n"),
        (NOTES['not in the registry'][0], 0, ' -e .\n'),
    ],
)
def test_the_report(seen, status, end, monkeypatch, capsys):
    monkeypatch.setattr(report, 'look', lambda: seen)
    assert doctor.main([]) == status
    out = capsys.readouterr().out
    assert out.endswith(end)
    assert ('\nPROBLEM ' in out) == bool(status)
    rows = [line.split() for line in out.splitlines()]
    assert ['mmcv', 'onedl-mmcv', '2.3.6', '2.3.6'] in rows
    assert ['timm', '-'] in rows
    if seen.devices:
        assert ['torch', 'torch', '2.13.0,', 'CUDA', '12.6', '2.13.0'] in rows
        assert ['GPU', 'NVIDIA', 'A100', '(0),', '8.0'] in rows


def test_the_tested_versions_are_those_of_requirements():
    pins = (ROOT / 'requirements' / 'tested.txt').read_text()
    for package in report.TESTED.keys() - {'Python', 'torch'}:
        name = PACKAGES[package][0]
        assert f'{name}=={report.TESTED[package]}\n' in pins
    script = (ROOT / 'tools' / 'environment.sh').read_text()
    assert report.TESTED['torch'] in script


def test_probes_tell_the_last_line_of_an_error():
    outputs, failures = probe(
        {
            'well': 'print(1)',
            'ill': 'import no_such_module',
            'killed': 'import os; os._exit(7)',
        }
    )
    assert outputs == {'well': '1\n'}
    assert failures == {
        'ill': "ModuleNotFoundError: No module named 'no_such_module'",
        'killed': 'exit status 7',
    }


def test_a_folder_that_was_left_behind_is_no_package(tmp_path, monkeypatch):
    (tmp_path / 'left_behind').mkdir()
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'whole' / '__init__.py').write_text('raise SystemExit(1)')
    monkeypatch.syspath_prepend(tmp_path)
    assert findable(['left_behind', 'whole', 'missing']) == {'whole'}


def test_the_doctor_works_where_nothing_else_does(tmp_path):
    for package in ('torch', 'mmengine', 'mmcv'):
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').write_text('raise OSError("bad")')
    for name in ('torch', 'mmengine', 'onedl_mmengine', 'mmcv'):
        info = tmp_path / f'{name}-2.7.3.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: 2.7.3\n')
    # -S: without the packages of the running interpreter.
    process = subprocess.run(
        [sys.executable, '-S', '-m', 'e3va_mm.doctor'],
        cwd=tmp_path,
        env={'PYTHONPATH': f'{tmp_path}:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and process.stderr == ''
    assert 'onedl-mmengine 2.7.3, mmengine 2.7.3' in process.stdout
    assert 'PROBLEM Each framework should be' in process.stdout
    assert 'PROBLEM Neither mmdet nor mmseg' in process.stdout


def test_this_environment_has_no_problem(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    process = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'doctor.py'],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert 'PROBLEM' not in process.stdout
    build = 'CUDA' if torch.version.cuda else 'CPU'
    assert f'torch {version("torch")}, {build}' in process.stdout
