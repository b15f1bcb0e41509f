"""tools/dist_*.sh and slurm_*.sh: what they start, and how they end.

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

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
VARIABLES = {
    *('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'PORT'),
    *('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS'),
}
GRACE = 60  # seconds


def environment(**variables):
    """This process's, without what the scripts would read."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {
        **kept,
        'CUDA_VISIBLE_DEVICES': '',
        'PYTHON': sys.executable,
        **{name: str(value) for name, value in variables.items()},
    }


def run(script, *arguments, **variables):
    return subprocess.run(
        ['bash', TOOLS / f'{script}.sh', *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=GRACE,
    )


@pytest.fixture
def stub(tmp_path):
    """A command that notes its arguments, and what it was called with."""
    path = tmp_path / 'bin' / 'srun'
    path.parent.mkdir()
    noted = tmp_path / 'noted'
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" $MASTER_PORT >{noted}\n')
    path.chmod(0o755)

    def called(script, *arguments, **variables):
        python = path if script.startswith('dist') else 'python3'
        process = run(
            script,
            *arguments,
            PATH=f'{path.parent}:{os.environ["PATH"]}',
            **{'PYTHON': python, **variables},
        )
        assert process.returncode == 0, process.stderr
        return noted.read_text().splitlines()

    return called


@pytest.mark.parametrize(
    'script, arguments, variables, text',
    [
        ('dist_train', ['c.py'], {}, 'CONFIG and GPUS should be given, but'),
        ('dist_test', ['c.py', 2], {}, 'CONFIG, CHECKPOINT and GPUS should'),
        ('slurm_train', 'pjc', {}, 'CONFIG and WORK_DIR should be given'),
        ('slurm_test', 'pjc', {}, 'CONFIG and CHECKPOINT should be given'),
        ('dist_train', ['c.py', '08'], {}, "at least 1, but got '08'."),
        ('dist_test', ['c.py', 'x.pth', 'two'], {}, "1, but got 'two'."),
        (
            'dist_train',
            ['c.py', 2],
            dict(NNODES=2),
            'NNODES=2 needs MASTER_ADDR and NODE_RANK beside it.',
        ),
        ('slurm_train', 'pjcw', dict(GPUS='x'), 'GPUS should be a whole'),
    ],
)
def test_calls_that_cannot_work(script, arguments, variables, text):
    process = run(script, *arguments, **variables)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith('error: ') and text in line
    assert f' Usage: bash tools/{script}.sh ' in line


@pytest.mark.parametrize(
    'variables, rendezvous',
    [
        ({}, ['--standalone', '--local_addr', '127.0.0.1']),
        (
            dict(PORT=29511),
            ['--master_addr', '127.0.0.1', '--master_port', '29511'],
        ),
        (
            dict(NNODES=2, NODE_RANK=1, MASTER_ADDR='10.0.0.1'),
            ['--nnodes', '2', '--node_rank', '1', '--master_addr']
            + ['10.0.0.1', '--master_port', '29500'],
        ),
    ],
)
def test_what_torchrun_is_told(stub, variables, rendezvous):
    found = stub('dist_train', 'c.py', 2, '--work-dir', 'a b', **variables)
    assert found == [
        *('-m', 'torch.distributed.run', *rendezvous, '--nproc_per_node', '2'),
        *(f'{TOOLS}/train.py', '--launcher', 'pytorch', 'c.py'),
        *('--work-dir', 'a b'),
    ]
    found = stub('dist_test', 'c.py', 'x.pth', 1, '--tta', **variables)
    assert found[-6:] == [
        *(f'{TOOLS}/test.py', '--launcher', 'pytorch'),
        *('c.py', 'x.pth', '--tta'),
    ]


def test_what_srun_is_told(stub):
    *found, port = stub('slurm_train', 'gpus', 'my job', 'c.py', 'w', '--amp')
    assert found == [
        *('-p', 'gpus', '--job-name=my job', '--gres=gpu:8'),
        *('--ntasks-per-node=8', '--ntasks=8', '--cpus-per-task=5'),
        *('--kill-on-bad-exit=1', 'python3', '-u', f'{TOOLS}/train.py'),
        *('--launcher', 'slurm', 'c.py', '--work-dir', 'w', '--amp'),
    ]
    assert 10000 <= int(port) < 30000
    found = stub(
        *('slurm_test', 'gpus', 'job', 'c.py', 'x.pth', '--out', 'x.pkl'),
        **dict(GPUS=16, GPUS_PER_NODE=4, CPUS_PER_TASK=2, PORT=29511),
        SRUN_ARGS='--time=1:00 --mem=8G',
    )
    assert found == [
        *('-p', 'gpus', '--job-name=job', '--gres=gpu:4'),
        *('--ntasks-per-node=4', '--ntasks=16', '--cpus-per-task=2'),
        *('--kill-on-bad-exit=1', '--time=1:00', '--mem=8G', 'python3'),
        *('-u', f'{TOOLS}/test.py', '--launcher', 'slurm', 'c.py', 'x.pth'),
        *('--out', 'x.pkl', '29511'),
    ]
    found = stub('slurm_train', *'pjcw', GPUS=2)
    assert {'--gres=gpu:2', '--ntasks-per-node=2', '--ntasks=2'} < set(found)
    found = stub('slurm_train', *'pjcw', GPUS=2, GPUS_PER_NODE=0)
    assert not [a for a in found if 'gres' in a or 'per-node' in a]


@pytest.fixture
def start(tmp_path):
    """Start the script beside a ``train.py`` that the test writes."""
    folder = tmp_path / 'tools'
    folder.mkdir()
    for name in ('dist_train.sh', 'distributed.sh'):
        shutil.copy(TOOLS / name, folder)

    def start(text, **variables):
        (folder / 'train.py').write_text(text)
        return subprocess.Popen(
            ['bash', folder / 'dist_train.sh', 'c.py', '2'],
            env=environment(**variables),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            # A test runner in the background may have it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


def test_two_machines_number_their_processes(tmp_path, start):
    text = """
import os, pathlib
env = os.environ
names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
pathlib.Path('rank' + env['RANK']).write_text(' '.join(map(env.get, names)))
"""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    shared = dict(NNODES=2, PORT=port, MASTER_ADDR='127.0.0.1')
    nodes = [start(text, NODE_RANK=rank, **shared) for rank in (1, 0)]
    for node in nodes:
        _, error = node.communicate(timeout=GRACE)
        assert node.returncode == 0, error
    for rank in range(4):
        said = (tmp_path / f'rank{rank}').read_text()
        assert said == f'{rank} {rank % 2} 4 127.0.0.1 {port}'


@pytest.mark.parametrize('victim', ['script', 'rank'])
def test_no_process_is_left_when_one_ends(tmp_path, start, victim):
    text = """
import os, pathlib, time
pathlib.Path('begun' + os.environ['RANK']).write_text(str(os.getpid()))
time.sleep(60)
"""
    process = start(text)
    begun = [tmp_path / 'begun0', tmp_path / 'begun1']
    end = time.monotonic() + GRACE
    while not all(p.exists() and p.read_text() for p in begun):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    ranks = [int(path.read_text()) for path in begun]
    if victim == 'script':
        process.send_signal(signal.SIGINT)
    else:
        os.kill(ranks[1], signal.SIGKILL)
    _, error = process.communicate(timeout=GRACE)
    if victim == 'script':
        assert process.returncode == 130
    else:
        assert process.returncode == 1
        assert 'Signal 9 (SIGKILL) received by PID' in error
        assert error.endswith(
            'memory may have run out. To resume, rerun the command with '
            '--resume.\n'
        )
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
