"""The parts of tools/environment.sh that decide, remember and fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SCRIPT = TOOLS / 'environment.sh'


def command(code):
    return ['bash', '-c', f'set -euo pipefail\n. {SCRIPT}\n{code}']


def bash(tmp_path, code, **environment):
    process = subprocess.run(
        command(code),
        capture_output=True,
        text=True,
        env={**os.environ, 'E3VA_VENV': f'{tmp_path}/venv', **environment},
    )
    return process.returncode, process.stdout, process.stderr


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('script', sorted(TOOLS.glob('*.sh')))
def test_scripts_are_sound_shell(script):
    subprocess.run(['bash', '-n', script], check=True)
    sourced = script.name in ('environment.sh', 'distributed.sh')
    assert sourced or 'set -euo pipefail' in script.read_text()


@pytest.mark.parametrize(
    'arguments, paths, expected',
    [
        (['--help'], {}, 'unknown arguments: --help\nTO DO   Give --real'),
        (['--real', 'now'], {}, 'unknown arguments: --real now\n'),
        (
            ['--real'],
            dict(E3VA_BCCD='nowhere'),
            'E3VA_BCCD=nowhere does not exist.\nTO DO   Correct the path',
        ),
    ],
)
def test_quickstart_refuses_what_cannot_be_before_it_installs(
    tmp_path, arguments, paths, expected
):
    process = subprocess.run(
        ['bash', TOOLS / 'quickstart.sh', *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'E3VA_VENV': f'{tmp_path}/venv', **paths},
    )
    assert process.returncode == 1
    assert expected in process.stderr
    assert not process.stdout and not (tmp_path / 'venv').exists()


def test_a_failing_step_says_what_why_and_what_to_do(tmp_path):
    code = """
work() { echo first; echo the reason >&2; return 3; }
step 'some work' 'Do this.' work well
echo never
"""
    status, out, error = bash(tmp_path, code)
    assert status == 1
    assert 'some work' in out and 'never' not in out
    log = tmp_path / 'venv' / '.e3va' / 'logs' / 'some_work.log'
    assert log.read_text() == 'first\nthe reason\n'
    assert error.startswith('first\nthe reason\n')
    assert 'FAILED  some work\nTO DO   Do this.\n' in error
    assert 'The command was: work well\n' in error


def test_a_step_is_repeated_for_another_key_or_after_a_failure(tmp_path):
    code = f"""
work() {{ echo $1 >>{tmp_path}/done; [ "$1" != bad ]; }}
once thing 1 title todo work a
once thing 1 title todo work b
once thing 2 title todo work c
once other 2 title todo work d
once more 2 title todo work bad
"""
    assert bash(tmp_path, code)[0] == 1
    assert bash(tmp_path, 'once more 2 t t true; once thing 2 t t false') == (
        (0, '   t\n', '')
    )
    assert (tmp_path / 'done').read_text().split() == ['a', 'c', 'd', 'bad']


def test_an_interruption_ends_the_command_and_says_how_to_resume(tmp_path):
    # It would write a second time, were it left alive.
    code = f"""
step work todo sh -c 'touch {tmp_path}/begun; sleep 2; touch {tmp_path}/left'
"""
    process = subprocess.Popen(
        command(code),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'E3VA_VENV': f'{tmp_path}/venv'},
        start_new_session=True,
        # A test runner in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / 'begun').exists():
        time.sleep(0.02)
    # As a terminal does it.
    os.killpg(process.pid, signal.SIGINT)
    assert 'Rerun the command to resume.' in process.communicate()[1]
    assert process.returncode == 130
    time.sleep(2.2)
    assert not (tmp_path / 'left').exists()


def test_a_lock_covers_what_a_killed_script_left_at_work(tmp_path):
    (tmp_path / 'file').touch()
    first = subprocess.Popen(
        command(f"""
lock {tmp_path}/file
touch {tmp_path}/begun; sleep 5; touch {tmp_path}/never
""")
    )
    while not (tmp_path / 'begun').exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    status, out, _ = bash(tmp_path, f'lock {tmp_path}/file')
    assert status == 0
    assert 'Waiting for another run to end' in out


@pytest.mark.parametrize(
    'version, status',
    [((3, 9), 1), ((3, 10), 0), ((3, 13), 0), ((3, 14), 1), ((4, 0), 1)],
)
def test_pythons_3_10_to_3_13_are_supported(tmp_path, version, status):
    pretend = f'import sys; sys.version_info = {version}\n'
    python = executable(
        tmp_path / 'python', f'exec {sys.executable} -c "{pretend}$2"'
    )
    assert bash(tmp_path, f'supported {python}')[0] == status


def test_the_first_python_that_is_supported_is_taken(tmp_path):
    code = 'once() { echo "$2"; }; make_venv'
    for name in ('python3.11', 'python3.10', 'python3'):
        executable(tmp_path / 'bin' / name, 'exit 1')
    path = f'{tmp_path}/bin:/usr/bin:/bin'
    executable(tmp_path / 'bin' / 'python3.12', 'exit 1')
    status, _, error = bash(tmp_path, code, PATH=path, PYTHON='')
    assert status == 1
    assert 'No Python 3.10 to 3.13' in error
    assert 'apt-get install python3 python3-venv' in error
    executable(tmp_path / 'bin' / 'python3.12', '')
    status, out, _ = bash(tmp_path, code, PATH=path, PYTHON='')
    assert (status, out) == (0, 'python3.12\n')
    status, _, error = bash(tmp_path, code, PATH=path, PYTHON='/bin/false')
    assert status == 1 and 'ensurepip: /bin/false.' in error


def test_an_environment_of_somebody_else_is_left_alone(tmp_path):
    theirs = tmp_path / 'venv' / 'theirs'
    theirs.parent.mkdir()
    theirs.touch()
    status, _, error = bash(tmp_path, 'make_venv')
    assert status == 1
    assert 'exists and was not made here' in error
    assert theirs.exists()


def test_operators_come_from_a_wheel_that_runs_or_are_compiled(tmp_path):
    compiled = f'{tmp_path}/cache/onedl-mmcv==2.3.6/'
    found = f'{tmp_path}/venv/.e3va/wheels'
    code = """
use_ops() { echo "use $1"; [ -e "$1/good" ]; }
pip() { echo "pip $1"; }
python=true
install_ops
"""
    variables = dict(E3VA_CACHE=f'{tmp_path}/cache')
    status, out, _ = bash(tmp_path, code, **variables)
    # Once more without the GPU before it is compiled.
    tried = [f'use {compiled}', f'use {found}'] * 2
    compiling = ['pip download', *tried, 'pip wheel', f'use {compiled}']
    assert (status, out.splitlines()) == (1, compiling)
    Path(compiled, 'good').mkdir(parents=True)
    status, out, _ = bash(tmp_path, code, **variables)
    expected = ['pip download', f'use {compiled}']
    assert (status, out.splitlines()) == (0, expected)


def test_the_script_names_no_index_of_packages():
    text = SCRIPT.read_text()
    for option in ('--index-url', '--find-links', '://'):
        assert option not in text
