"""A run that is killed at random moments resumes, and loses nothing."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'kill_resume.py'


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_kills():
    done = subprocess.run(
        [sys.executable, SCRIPT, '--kills', '10', '--alive', '1'],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = re.search(
        r'^10 kills, (\d+) while it trained, .*; (\d+) iterations; all files '
        'loaded, all resumes went on from the newest checkpoint, no bit '
        'differs from a run without kills',
        done.stdout,
        re.M,
    )
    assert found, done.stdout
    trained, iterations = map(int, found.groups())
    assert 5 <= trained <= 10
    assert iterations >= 4


def checkpoint(folder, number):
    path = folder / f'iter_{number}.pth'
    torch.save(dict(meta=dict(iter=number), state_dict={}), path)
    (folder / 'last_checkpoint').write_text(str(path))
    return path


def test_a_broken_file_is_seen(benchmark, tmp_path):
    assert benchmark.newest_of(tmp_path) == (0, 0, [])
    path = checkpoint(tmp_path, 3)
    (tmp_path / '.iter_4.pth.part').touch()
    assert benchmark.newest_of(tmp_path) == (0, 3, ['.iter_4.pth.part'])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(benchmark.Failure, match='last_checkpoint names '):
        benchmark.newest_of(tmp_path)
    checkpoint(tmp_path, 3)
    (tmp_path / 'adapter_iter_9.safetensors').write_bytes(b'x')
    with pytest.raises(benchmark.Failure, match='the newest adapter file: '):
        benchmark.newest_of(tmp_path)
    (tmp_path / 'adapter_iter_9.safetensors').unlink()
    (tmp_path / 'last_checkpoint').write_text('')
    with pytest.raises(benchmark.Failure, match="last_checkpoint names ''"):
        benchmark.newest_of(tmp_path)


@pytest.mark.parametrize(
    'other, expected',
    [
        (dict(a=[torch.ones(2), 1]), []),
        (dict(a=[torch.ones(2) + 1e-7, 1]), ['x.a.0']),
        (dict(a=[torch.ones(2), 2]), ['x.a.1']),
        (dict(a=[torch.ones(2)]), ['x.a: length']),
        (dict(b=[]), ['x: keys']),
    ],
)
def test_a_bit_that_differs_is_seen(benchmark, other, expected):
    one = dict(a=[torch.ones(2), 1])
    assert list(benchmark.differing(one, other, 'x')) == expected
