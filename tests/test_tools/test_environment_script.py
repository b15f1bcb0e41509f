"""The parts of tools/environment.sh that decide, wait, remember and fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'environment.sh'


def command(tmp_path, code):
    setup = f"""
set -euo pipefail
. {SCRIPT}
venv={tmp_path}/venv stamps={tmp_path}/stamps logs={tmp_path}/logs
mkdir -p "$stamps" "$logs"
python={sys.executable}
"""
    return ['bash', '-c', setup + code]


def bash(tmp_path, code, **environment):
    process = subprocess.run(
        command(tmp_path, code),
        capture_output=True,
        text=True,
        # Not the stack that the tests themselves run on.
        env={**os.environ, 'E3VA_STACK': '', **environment},
    )
    return process.returncode, process.stdout, process.stderr


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def test_a_failing_step_says_what_why_and_what_to_do(tmp_path):
    code = """
work() { echo first; echo the reason >&2; return 3; }
step 'some work' 'Do this.' work well
echo never
"""
    status, out, error = bash(tmp_path, code)
    assert status == 1
    assert 'some work' in out and 'never' not in out
    log = tmp_path / 'logs' / 'some_work.log'
    assert log.read_text() == 'first\nthe reason\n'
    assert f'-- the last lines of {log}\nfirst\nthe reason\n' in error
    assert 'FAILED  some work\nTO DO   Do this.\n' in error
    assert 'The command was: work well\n' in error


def test_a_stamp_holds_for_its_key_alone(tmp_path):
    code = """
done_before thing 1 && echo wrong
remember thing 1
done_before thing 1 && echo right
done_before thing 2 && echo wrong
done_before other 1 && echo wrong
true
"""
    assert bash(tmp_path, code)[:2] == (0, 'right\n')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_ends_the_command_and_its_children(tmp_path, number):
    # The grandchild would write a second time, were it left alive.
    code = f"""
work() {{ sh -c 'touch {tmp_path}/begun; sleep 2; touch {tmp_path}/left'; }}
step 'long work' 'Do this.' work
"""
    process = subprocess.Popen(
        command(tmp_path, code),
        stderr=subprocess.PIPE,
        text=True,
        # A test runner in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / 'begun').exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert 'The same command goes on from here' in process.communicate()[1]
    assert process.returncode == 130
    time.sleep(2.2)
    assert not (tmp_path / 'left').exists()


def test_a_lock_covers_what_a_killed_script_left_at_work(tmp_path):
    (tmp_path / 'file').touch()
    first = subprocess.Popen(
        command(
            tmp_path,
            f"""
lock {tmp_path}/file
work() {{ touch {tmp_path}/begun; sleep 1; touch {tmp_path}/ended; }}
step 'long work' 'Do this.' work
""",
        )
    )
    while not (tmp_path / 'begun').exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    code = f'lock {tmp_path}/file; test -e {tmp_path}/ended && unlock'
    status, out, _ = bash(tmp_path, code)
    assert status == 0
    assert 'waiting for it to end' in out


def test_progress_is_the_last_count_or_else_the_last_line(tmp_path):
    log = tmp_path / 'log'
    log.write_text('  [1/78] c++ -MMD\n  [2/78] c++ -MMD\n  a warning\n')
    assert bash(tmp_path, f'progress {log}')[1] == '  [2/78]'
    log.write_text('first\nsecond\n')
    assert bash(tmp_path, f'progress {log}')[1] == 'second'


@pytest.mark.parametrize(
    'version, supported',
    [((3, 9), 1), ((3, 10), 0), ((3, 12), 0), ((3, 13), 1), ((4, 0), 1)],
)
def test_pythons_3_10_to_3_12_are_supported(tmp_path, version, supported):
    pretend = f'import sys; sys.version_info = {version}\n'
    python = executable(
        tmp_path / 'python', f'exec {sys.executable} -c "{pretend}$2" "$3"'
    )
    assert bash(tmp_path, f'supported {python}')[0] == supported


@pytest.mark.parametrize(
    'version, supported', [((3, 10), 0), ((3, 11), 0), ((3, 12), 1)]
)
def test_the_originals_need_3_10_or_3_11(tmp_path, version, supported):
    pretend = f'import sys; sys.version_info = {version}\n'
    python = executable(
        tmp_path / 'python', f'exec {sys.executable} -c "{pretend}$2" "$3"'
    )
    code = f'choose_stack openmmlab; supported {python}'
    assert bash(tmp_path, code)[0] == supported


SHOWN = 'echo $ops $frameworks $pins $torch_version ${venv#"$repository"/}'


@pytest.mark.parametrize(
    'name, choice',
    [
        ('onedl', 'onedl-mmcv mminstall tested 2.13.0 .venv'),
        ('openmmlab', 'mmcv openmmlab openmmlab 2.1.2 .venv-openmmlab'),
    ],
)
def test_a_stack_has_packages_and_an_environment_of_its_own(
    tmp_path, name, choice
):
    variables = {'E3VA_STACK': name, 'E3VA_VENV': '', 'E3VA_TORCH': ''}
    code = f'choose_stack {name}; {SHOWN}'
    assert bash(tmp_path, code, **variables)[:2] == (0, f'{choice}\n')
    ops, frameworks, pins, *_ = choice.split()
    requirements = SCRIPT.parents[1] / 'requirements'
    assert f'{ops}==' in (requirements / f'{pins}.txt').read_text()
    assert ops in (requirements / f'{frameworks}.txt').read_text()


def test_what_the_caller_names_comes_before_the_stack(tmp_path):
    variables = {'E3VA_VENV': '/mine', 'E3VA_TORCH': '2.1.0+cpu'}
    code = 'choose_stack openmmlab; echo $venv $torch_version'
    assert bash(tmp_path, code, **variables)[1] == '/mine 2.1.0+cpu\n'


def test_an_unknown_stack_is_explained():
    script = SCRIPT.parent / 'run_tests.sh'
    process = subprocess.run(
        ['bash', str(script), '--stack', 'mine'],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "There is no stack called 'mine'" in process.stderr
    assert 'TO DO   Choose onedl' in process.stderr


def test_the_ops_alone_are_left_to_their_own_step(tmp_path):
    code = """
requirements=$repository/requirements
choose_stack openmmlab
step() { shift 2; "$@"; }
pip() { :; }
install_headless_opencv() { echo headless; }
install() { cat "$stamps/openmmlab.txt"; }
install_packages key openmmlab
"""
    status, out, _ = bash(tmp_path, code)
    assert status == 0 and out.endswith('headless\n')
    assert 'mmengine==' in out and 'mmdet==' in out
    assert 'mmcv==' not in out


def test_python_that_is_too_old_is_passed_over(tmp_path):
    for name in ('python3.12', 'python3.10', 'python3'):
        executable(tmp_path / 'bin' / name, 'exit 1')
    good = tmp_path / 'bin' / 'python3.11'
    good.symlink_to(sys.executable)
    path = f'{tmp_path}/bin:/usr/bin:/bin'
    status, out, _ = bash(
        tmp_path, 'find_python; echo "$base"', PATH=path, PYTHON=''
    )
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        assert (status, out) == (0, f'{good}\n')


@pytest.mark.parametrize(
    'text, message',
    [
        ('exit 1', 'No Python 3.11 or 3.12 or 3.10 was found'),
        # Answers every question but that for the modules.
        (
            'case "$2" in *executable*) echo $0;; *ensurepip*) exit 1;; esac',
            'apt-get install python3-venv',
        ),
    ],
)
def test_unusable_pythons_are_explained(tmp_path, text, message):
    for version in ('3.10', '3.11', '3.12', '3'):
        executable(tmp_path / 'bin' / f'python{version}', text)
    path = f'{tmp_path}/bin:/usr/bin:/bin'
    status, _, error = bash(tmp_path, 'find_python', PATH=path, PYTHON='')
    assert status == 1
    assert message in error and 'TO DO' in error


def test_a_wrong_choice_of_python_is_an_error(tmp_path):
    status, _, error = bash(tmp_path, 'make_venv', PYTHON='/bin/false')
    assert status == 1
    assert 'PYTHON=/bin/false is not a Python 3.11 or 3.12 or 3.10' in error


def test_an_environment_of_somebody_else_is_left_alone(tmp_path):
    theirs = tmp_path / 'venv' / 'theirs'
    theirs.parent.mkdir()
    theirs.touch()
    code = f'stamps=$venv/.e3va; PYTHON={sys.executable}; make_venv'
    status, _, error = bash(tmp_path, code)
    assert status == 1
    assert 'exists and was not made here' in error
    assert theirs.exists()


def test_a_missing_compiler_is_explained(tmp_path):
    status, _, error = bash(tmp_path, 'check_compiler', CXX='no-such-c++')
    assert status == 1
    assert 'no-such-c++ was not found' in error
    assert 'apt-get install g++' in error


def test_missing_headers_of_python_are_explained(tmp_path):
    text = 'echo no Python.h >&2; exit 1'
    compiler = executable(tmp_path / 'compiler', text)
    status, _, error = bash(tmp_path, 'check_compiler', CXX=str(compiler))
    assert status == 1
    assert 'cannot compile C++17 with Python.h' in error
    assert 'python3-dev' in error
    assert 'no Python.h' in (tmp_path / 'stamps' / 'trial.log').read_text()


def test_half_installed_packages_are_forgotten(tmp_path):
    packages = tmp_path / 'venv' / 'lib' / 'python3.11' / 'site-packages'
    for name in ('whole-1.0.dist-info', 'half-1.0.dist-info'):
        (packages / name).mkdir(parents=True)
        (packages / name / 'METADATA').touch()
    (packages / 'whole-1.0.dist-info' / 'INSTALLER').touch()
    assert bash(tmp_path, 'forget_half_installed')[0] == 0
    assert [p.name for p in packages.iterdir()] == ['whole-1.0.dist-info']


def test_the_script_names_no_index_of_packages():
    text = SCRIPT.read_text()
    for option in ('--index-url', '--find-links', '://'):
        assert option not in text
