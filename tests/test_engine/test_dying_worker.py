"""One of two processes is killed: the job stops, says so, and can go on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from e3va_mm.weights import adapter_file, read_adapter
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
WORLD = 2
# Seconds; the job ends within two, on an idle machine.
BOUND = 60
MORE = """
# Every parameter that trains has a gradient.
model['backbone']['out_indices'] = (3,)
# The processes import this module: it has the hook.
custom_imports = dict(imports=['tests.test_engine.test_dying_worker'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6)
default_hooks = dict(checkpoint=dict(interval=2))
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False),
    dict(type='DyingHook', where={where!r})]
"""


def die():
    Path('died').write_text(f'{time.time()}')
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class DyingHook(Hook):
    """Kills its process once: in the fourth step, or in writing after it."""

    def __init__(self, where):
        self.where = where

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != 3 or Path('died').exists():
            return
        if self.where == 'step' and runner.rank == 1:
            die()
        if self.where == 'write' and runner.rank == 0:
            # All is in the temporary file, and not under its name.
            adapter_file.os.replace = lambda *args: die()


def config_in(folder, where):
    make_segmentation(folder)
    config, _, _ = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=0, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None",
        MORE.format(where=where),
    )
    return str(config)


def environment(**variables):
    return {
        **os.environ,
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
        'PYTHON': sys.executable,
        'PYTHONPATH': str(TOOLS.parent),
        **{name: str(value) for name, value in variables.items()},
    }


def train(folder, *arguments):
    return subprocess.run(
        ['bash', TOOLS / 'dist_train.sh', *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def seconds_since_death(folder):
    return time.time() - float((folder / 'died').read_text())


def check_adapters(folder, *last):
    """The newest is whole, and so are the others."""
    work = folder / 'work'
    files = sorted(work.glob('adapter_*'))
    assert files[-1].name in [f'adapter_iter_{n}.safetensors' for n in last]
    for file in files:
        assert read_adapter(file).trainable


def test_a_killed_process_ends_the_job(tmp_path):
    config = config_in(tmp_path, 'step')
    process = train(tmp_path, config, str(WORLD))
    assert seconds_since_death(tmp_path) < BOUND
    assert process.returncode == 1
    text = process.stderr
    assert re.search(
        r'Root Cause .*\n\[0\]:\n.*\n.*\n  rank +: 1 .*\n'
        r'  exitcode +: -9 .*SIGKILL',
        text,
    ), text
    assert text.endswith('To resume, rerun the command with --resume.\n')
    # Rank 0 may have been ended before it wrote the third.
    check_adapters(tmp_path, 2, 3)
    process = train(tmp_path, config, str(WORLD), '--resume')
    assert process.returncode == 0, process.stderr
    assert 'resumed epoch: 0, iter: 2' in process.stdout
    check_adapters(tmp_path, 6)


def test_a_process_on_another_machine_tells_as_well(tmp_path):
    """Nobody ends it there: it has lost its connection.

    And the one that is killed was writing an adapter file.
    """
    config = config_in(tmp_path, 'write')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, TOOLS / 'train.py', config]
            + ['--launcher', 'pytorch'],
            cwd=tmp_path,
            env=environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=WORLD,
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port,
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        _, text = ranks[1].communicate(timeout=200)
        assert seconds_since_death(tmp_path) < BOUND
    finally:
        for each in ranks:
            each.kill()
            each.communicate()
    assert [each.returncode for each in ranks] == [-signal.SIGKILL, 1]
    assert 'Traceback' in text
    last = text.splitlines()[-1]
    assert last.startswith('error: rank 1 of 2 failed with the ')
    assert 'another rank died before: see its last lines' in last
    assert last.endswith('; continue with --resume')
    check_adapters(tmp_path, 3)
