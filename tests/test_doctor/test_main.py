"""The report, and the ways to call for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from e3va_mm.doctor import __main__ as report
from e3va_mm.doctor import snapshot
from tests.test_doctor.test_checks import CASES, GPU, NOTES
from tests.test_doctor.test_checks import snapshot as simulated

ROOT = Path(__file__).resolve().parents[2]


def printed(seen, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(report, 'look', lambda: seen)
    status = report.main()
    return status, capsys.readouterr().out


@pytest.mark.parametrize('plain', [False, True])
def test_the_table_names_all_and_what_was_tested(plain, monkeypatch, capsys):
    if plain:
        # As where rich is missing.
        monkeypatch.setitem(sys.modules, 'rich.console', None)
    seen = simulated(
        torch_cuda='12.6',
        torch_archs=('sm_80',),
        devices={GPU: 'sm_80'},
        ops_archs=('sm_80', 'compute_80'),
    )
    status, out = printed(seen, monkeypatch, capsys)
    assert status == 0 and out.endswith('Nothing is wrong.\n')
    assert ('│' in out) is not plain
    rows = [line.replace('│', ' ').split() for line in out.splitlines()]
    assert ['torch', 'torch', '2.13.0,', 'CUDA', '12.6', '2.13.0'] in rows
    assert ['mmcv', 'onedl-mmcv', '2.3.6', '2.3.6'] in rows
    assert ['timm', '-'] in rows
    assert ['ops', 'of', 'mmcv', 'sm_80', 'compute_80'] in rows
    assert ['GPU', *GPU.split()[:-1], '(0),', 'sm_80'] in rows


@pytest.mark.parametrize(
    'case, tested',
    [
        ('both lines of distributions', '2.13.0'),
        ('the maintained mmcv with the original mmdet', '2.13.0'),
        ('mmcv 2.2.0 with mmdet 3.3.0', '2.1.2'),
    ],
)
def test_the_tested_versions_follow_mmengine(case, tested):
    (row,) = [r for r in report.rows(CASES[case][0]) if r[0] == 'torch']
    assert row[2] == tested


def test_a_problem_ends_with_1_and_the_line_that_mends(monkeypatch, capsys):
    seen, what, mend = CASES['numpy 1 with the maintained mmseg']
    status, out = printed(seen, monkeypatch, capsys)
    assert status == 1
    assert f'PROBLEM {what}' in out and f'\nTO DO   {mend}\n' in out


def test_a_note_is_no_failure(monkeypatch, capsys):
    seen, _, mend = NOTES['not in the registry']
    status, out = printed(seen, monkeypatch, capsys)
    assert status == 0
    assert 'NOTE    e3va_mm is not installed' in out
    assert f'\nTO DO   {mend}\n' in out


@pytest.mark.parametrize('line', [0, 1])
def test_the_tested_versions_are_those_of_requirements(line):
    name = ('tested', 'openmmlab')[line]
    pins = (ROOT / 'requirements' / f'{name}.txt').read_text()
    for package, names in snapshot.DISTRIBUTIONS.items():
        if package in report.TESTED:
            version = report.TESTED[package][line]
            assert any(f'{n}=={version}\n' in pins for n in names[line:])
    script = (ROOT / 'tools' / 'environment.sh').read_text()
    assert f'torch_version={report.TESTED["torch"][line]} ' in script
    assert f"pythons='{report.TESTED['Python'][line]} " in script


def broken_environment(folder):
    """Packages that cannot be imported, two lines of distributions."""
    for package in ('torch', 'mmengine', 'mmcv'):
        (folder / package).mkdir()
        (folder / package / '__init__.py').write_text('raise OSError("bad")')
    for name in ('torch', 'mmengine', 'onedl_mmengine', 'mmcv'):
        info = folder / f'{name}-1.2.3.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: 1.2.3\n')


def call(folder, *command):
    # -S: without the site-packages of the running interpreter, and so
    # without rich.
    return subprocess.run(
        [sys.executable, '-S', *command],
        cwd=folder,
        env={'PYTHONPATH': f'{folder}:{ROOT}'},
        capture_output=True,
        text=True,
    )


def test_the_doctor_speaks_where_the_package_refuses_to(tmp_path):
    broken_environment(tmp_path)
    process = call(tmp_path, '-m', 'e3va_mm.doctor')
    assert process.returncode == 1 and process.stderr == ''
    assert 'onedl-mmengine 1.2.3, mmengine 1.2.3' in process.stdout
    assert 'PROBLEM Each framework should be' in process.stdout
    assert 'PROBLEM Neither mmdet nor mmseg' in process.stdout
