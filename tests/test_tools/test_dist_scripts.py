"""tools/dist_*.sh and slurm_*.sh: their options, and how they end.

tests/test_engine/test_distributed_training.py trains and tests by them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
CONFIG = ROOT / 'configs' / 'cascade_e3va_swin_nano_digits.py'
SCRIPTS = dict(
    dist_train='CONFIG GPUS [arguments of tools/train.py]',
    dist_test='CONFIG CHECKPOINT GPUS [arguments of tools/test.py]',
    slurm_train='PARTITION JOB_NAME CONFIG WORK_DIR '
    '[arguments of tools/train.py]',
    slurm_test='PARTITION JOB_NAME CONFIG CHECKPOINT '
    '[arguments of tools/test.py]',
)
VARIABLES = {
    'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'PORT', 'GPUS',
    'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS',
}  # fmt: skip


def environment(**variables):
    """This process's, without what the scripts would read."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {
        **kept,
        'CUDA_VISIBLE_DEVICES': '',
        'PYTHON': sys.executable,
        **{name: str(value) for name, value in variables.items()},
    }


def run(script, *arguments, cwd, **variables):
    return subprocess.run(
        ['bash', TOOLS / f'{script}.sh', *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that runs the one before must not see half of this.
    new = path.with_name(f'{path.name}.new')
    new.write_text(f'#!/bin/sh\n{text}\n')
    new.chmod(0o755)
    return new.replace(path)


@pytest.fixture
def python(tmp_path):
    """An interpreter that sees GPUs, and notes what it is to launch."""

    def python(gpus, launch=f'printf "%s\\n" "$@" >{tmp_path}/launched'):
        # The shell itself tells apart what it is asked.
        return executable(
            tmp_path / 'python',
            f'case "$2" in *device_count*) echo {gpus};;\n'
            f'*create_server*) exec {sys.executable} "$@";;\n'
            f'*) {launch};; esac',
        )

    return python


def launched(folder):
    return (folder / 'launched').read_text().splitlines()


def pairs(options):
    return dict(zip(options[::2], options[1::2], strict=True))


# ---- calls that cannot work


def refused(process, script, *words):
    assert process.returncode == 2
    assert process.stdout == ''
    (line,) = process.stderr.splitlines()
    assert line.startswith('error: ')
    assert line.endswith(f'Usage: bash tools/{script}.sh {SCRIPTS[script]}')
    for word in words:
        assert word in line


@pytest.mark.parametrize('script', SCRIPTS)
def test_too_few_arguments(script, tmp_path):
    names = SCRIPTS[script].split(' [')[0].split()
    given = ['given'] * (len(names) - 1)
    process = run(script, *given, cwd=tmp_path)
    refused(process, script, f"should be given, but got '{' '.join(given)}'.")


@pytest.mark.parametrize('script', SCRIPTS)
def test_files_that_are_not_there(script, tmp_path):
    names = SCRIPTS[script].split(' [')[0].split()
    values = dict(CONFIG=CONFIG, CHECKPOINT=CONFIG, GPUS=2)
    for missing in {'CONFIG', 'CHECKPOINT'} & set(names):
        given = [{**values, missing: 'no.file'}.get(n, n) for n in names]
        process = run(script, *given, cwd=tmp_path)
        refused(
            process, script, f"{missing} should be a file, but got 'no.file'."
        )


@pytest.mark.parametrize('gpus', ['two', '0', '-1', '08', '1.5', ''])
def test_gpus_that_are_no_number(gpus, tmp_path):
    text = f"GPUS should be a whole number of at least 1, but got '{gpus}'."
    process = run('dist_train', CONFIG, gpus, cwd=tmp_path)
    refused(process, 'dist_train', text)
    process = run('dist_test', CONFIG, 'https://x/y.pth', gpus, cwd=tmp_path)
    refused(process, 'dist_test', text)


def test_more_gpus_than_there_are(tmp_path, python):
    process = run('dist_train', CONFIG, 3, cwd=tmp_path, PYTHON=python(2))
    refused(process, 'dist_train', 'at most the 2 here, but got 3.')
    assert not (tmp_path / 'launched').exists()
    process = run('dist_train', CONFIG, 2, cwd=tmp_path, PYTHON=python(2))
    assert (process.returncode, process.stderr) == (0, '')
    assert launched(tmp_path)


@pytest.mark.parametrize('python', ['/bin/false', '/no/python'])
def test_interpreter_without_torch(python, tmp_path):
    process = run('dist_train', CONFIG, 2, cwd=tmp_path, PYTHON=python)
    refused(process, 'dist_train', f'{python} cannot import torch; set PYTHON')


@pytest.mark.parametrize(
    'variables, text',
    [
        (dict(NNODES='x'), 'NNODES should be a whole number of at least 1'),
        (dict(PORT='x'), 'PORT should be a whole number of at least 1'),
        (dict(NNODES=2), 'NNODES=2 needs MASTER_ADDR and NODE_RANK'),
        (
            dict(NNODES=2, MASTER_ADDR='a', NODE_RANK=2),
            'NODE_RANK should be below NNODES=2, but got 2.',
        ),
    ],
)
def test_machines_that_cannot_meet(variables, text, tmp_path, python):
    process = run(
        'dist_train', CONFIG, 2, cwd=tmp_path, PYTHON=python(0), **variables
    )
    refused(process, 'dist_train', text)


# ---- what torchrun is told


def test_one_machine_takes_a_free_port(tmp_path, python):
    process = run(
        'dist_train',
        CONFIG,
        2,
        '--work-dir',
        'a b',
        cwd=tmp_path,
        PYTHON=python(0),
    )
    assert process.returncode == 0
    assert process.stderr == ('No GPU here: 2 processes on CPUs, with gloo.\n')
    assert launched(tmp_path) == [
        '-m', 'torch.distributed.run', '--standalone',
        '--local_addr', '127.0.0.1', '--nproc_per_node', '2',
        f'{TOOLS}/train.py', '--launcher', 'pytorch',
        str(CONFIG), '--work-dir', 'a b',
    ]  # fmt: skip


def test_a_port_that_is_taken_is_replaced(tmp_path, python):
    call = ['dist_test', CONFIG, CONFIG, 1, '--tta']
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        process = run(*call, cwd=tmp_path, PYTHON=python(1), PORT=port)
    assert process.stderr == f'PORT={port} is taken; a free one is used.\n'
    assert launched(tmp_path)[2] == '--standalone'
    process = run(*call, cwd=tmp_path, PYTHON=python(1), PORT=port)
    assert process.stderr == ''
    assert launched(tmp_path)[2:] == [
        '--master_addr', '127.0.0.1', '--master_port', str(port),
        '--nproc_per_node', '1',
        f'{TOOLS}/test.py', '--launcher', 'pytorch',
        str(CONFIG), str(CONFIG), '--tta',
    ]  # fmt: skip


def test_several_machines_need_the_port_that_was_agreed(tmp_path, python):
    variables = dict(PYTHON=python(0), NNODES=2, MASTER_ADDR='127.0.0.1')
    call = ['dist_train', CONFIG, 1]
    with socket.create_server(('127.0.0.1', 0)) as taken:
        variables['PORT'] = port = taken.getsockname()[1]
        process = run(*call, cwd=tmp_path, NODE_RANK=0, **variables)
        refused(process, 'dist_train', f'PORT={port} is taken here; set')
        # Taken by machine 0, which has begun.
        process = run(*call, cwd=tmp_path, NODE_RANK=1, **variables)
    assert process.returncode == 0
    assert pairs(launched(tmp_path)[2:10]) == {
        '--nnodes': '2',
        '--node_rank': '1',
        '--master_addr': '127.0.0.1',
        '--master_port': str(port),
    }


# ---- processes


@pytest.fixture
def scripts(tmp_path):
    """The script beside a ``train.py`` that the test writes."""
    folder = tmp_path / 'tools'
    folder.mkdir()
    for name in ('dist_train.sh', 'distributed.sh'):
        shutil.copy(TOOLS / name, folder)

    def start(text, python, gpus, **variables):
        (folder / 'train.py').write_text(text)
        return subprocess.Popen(
            ['bash', folder / 'dist_train.sh', CONFIG, str(gpus)],
            env=environment(
                PYTHON=python(0, f'exec {sys.executable} "$@"'), **variables
            ),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test runner in the background may have it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


def test_two_machines_number_their_processes(tmp_path, scripts, python):
    text = """
import os, pathlib
env = os.environ
names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
pathlib.Path('rank' + env['RANK']).write_text(' '.join(map(env.get, names)))
"""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        scripts(
            text, python, 2, NNODES=2, NODE_RANK=rank, PORT=port,
            MASTER_ADDR='127.0.0.1',
        )
        for rank in (1, 0)
    ]  # fmt: skip
    for node in nodes:
        _, error = node.communicate(timeout=60)
        assert node.returncode == 0, error
    for rank in range(4):
        said = (tmp_path / f'rank{rank}').read_text()
        assert said == f'{rank} {rank % 2} 4 127.0.0.1 {port}'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_ends_all_processes(number, tmp_path, scripts, python):
    text = """
import os, pathlib, time
pathlib.Path('begun' + os.environ['RANK']).write_text(str(os.getpid()))
time.sleep(60)
"""
    process = scripts(text, python, 2)
    begun = [tmp_path / 'begun0', tmp_path / 'begun1']
    wait_for(lambda: all(p.exists() and p.read_text() for p in begun), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.endswith(
        'error: interrupted. The same command with --resume goes on from the '
        'last checkpoint.\n'
    )
    for path in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def worker(mark, rank):
    """The process of a rank, found by a variable that the job was given."""
    for path in Path('/proc').glob('[0-9]*/environ'):
        try:
            variables = path.read_bytes().split(b'\0')
        except OSError:  # ended, or not ours
            continue
        if {mark.encode(), f'RANK={rank}'.encode()} <= set(variables):
            return int(path.parent.name)
    raise LookupError(f'no process of rank {rank}')


@pytest.mark.skipif(
    not Path('/proc/self/environ').exists(), reason='finds a worker in /proc'
)
def test_a_killed_worker_ends_the_training(tmp_path):
    """It also trains on two processes: SyncBN as BN, gloo for nccl."""
    make_segmentation(tmp_path)
    endless = dict(train_cfg=dict(type='IterBasedTrainLoop', max_iters=10**6))
    keys = ('val_cfg', 'val_dataloader', 'val_evaluator')
    config = segmentation_config(tmp_path, **endless, **dict.fromkeys(keys))
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(
            ['bash', TOOLS / 'dist_train.sh', config, '2'],
            env=environment(MARK=tmp_path),
            stdout=log,
            stderr=log,
        )
        try:
            wait_for((tmp_path / 'work' / 'iter_2.pth').exists, process)
            os.kill(worker(f'MARK={tmp_path}', 1), signal.SIGKILL)
            assert process.wait(timeout=60) == 1
        finally:
            process.terminate()
    text = (tmp_path / 'log').read_text()
    assert text.count('Trainable parameters') == 1
    assert text.count('SyncBN needs GPUs: 22 layers run as BN') == 1
    assert 'Signal 9 (SIGKILL) received by PID' in text
    assert text.endswith(
        'error: a process of train.py failed or was killed, and the others '
        'were ended. The first error above says why, and Root Cause which '
        'rank; after Signal 9 alone, memory may have run out. The same '
        'command with --resume goes on from the last checkpoint.\n'
    )


# ---- slurm


@pytest.fixture
def srun(tmp_path):
    """A stub on the PATH; what it was called with, and its MASTER_PORT."""
    executable(
        tmp_path / 'bin' / 'srun',
        f'printf "%s\\n" "$@" >{tmp_path}/arguments\n'
        f'printf "%s" "$MASTER_PORT" >{tmp_path}/port\nexit 7',
    )

    def srun(script, *arguments, **variables):
        process = run(
            script, *arguments, cwd=tmp_path,
            PATH=f'{tmp_path}/bin:{os.environ["PATH"]}', **variables,
        )  # fmt: skip
        assert process.returncode == 7, process.stderr  # that of the job
        arguments = (tmp_path / 'arguments').read_text().splitlines()
        return arguments, int((tmp_path / 'port').read_text())

    return srun


def test_training_as_a_job(srun):
    arguments, port = srun(
        'slurm_train', 'gpus', 'my job', CONFIG, 'work dir', '--amp'
    )
    assert arguments == [
        '-p', 'gpus', '--job-name=my job', '--gres=gpu:8',
        '--ntasks-per-node=8', '--ntasks=8', '--cpus-per-task=5',
        '--kill-on-bad-exit=1', sys.executable, '-u', f'{TOOLS}/train.py',
        '--launcher', 'slurm', str(CONFIG), '--work-dir', 'work dir', '--amp',
    ]  # fmt: skip
    assert 10000 <= port < 30000


def test_testing_as_a_job(srun):
    arguments, port = srun(
        'slurm_test', 'gpus', 'job', CONFIG, CONFIG, '--out', 'x.pkl',
        GPUS=16, GPUS_PER_NODE=4, CPUS_PER_TASK=2, PORT=29511,
        SRUN_ARGS='--time=1:00 --mem=8G', PYTHON='python3',
    )  # fmt: skip
    assert arguments == [
        '-p', 'gpus', '--job-name=job', '--gres=gpu:4',
        '--ntasks-per-node=4', '--ntasks=16', '--cpus-per-task=2',
        '--kill-on-bad-exit=1', '--time=1:00', '--mem=8G', 'python3', '-u',
        f'{TOOLS}/test.py', '--launcher', 'slurm', str(CONFIG), str(CONFIG),
        '--out', 'x.pkl',
    ]  # fmt: skip
    assert port == 29511


def test_fewer_gpus_than_a_machine_has_and_none(srun):
    arguments, _ = srun('slurm_train', 'p', 'j', CONFIG, 'w', GPUS=2)
    assert {'--gres=gpu:2', '--ntasks-per-node=2', '--ntasks=2'} < set(
        arguments
    )
    arguments, _ = srun(
        'slurm_train', 'p', 'j', CONFIG, 'w', GPUS=2, GPUS_PER_NODE=0
    )
    assert '--ntasks=2' in arguments
    assert not [a for a in arguments if 'gres' in a or 'per-node' in a]


def test_jobs_that_cannot_work(tmp_path, srun):
    call = ['slurm_train', 'p', 'j', CONFIG, 'w']
    bare = tmp_path / 'bare'
    bare.mkdir()
    for name in ('bash', 'dirname'):
        (bare / name).symlink_to(shutil.which(name))
    process = run(*call, cwd=tmp_path, PATH=bare)
    refused(process, 'slurm_train', 'srun was not found')
    for name in ('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK'):
        process = run(*call, cwd=tmp_path, **{name: 'x'})
        refused(process, 'slurm_train', f'{name} should be a whole number')
