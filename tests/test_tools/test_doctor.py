"""tools/doctor.py in the environment of these tests, for real."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import torch

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'doctor.py'


def test_this_environment_has_no_problem(tmp_path):
    process = subprocess.run(
        [sys.executable, TOOL],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
            'COLUMNS': '200',
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert 'PROBLEM' not in process.stdout
    build = 'CUDA' if torch.version.cuda else 'CPU'
    assert f'torch {importlib.metadata.version("torch")}, {build}' in (
        process.stdout
    )
    (ops,) = [
        line for line in process.stdout.splitlines() if 'ops of mmcv' in line
    ]
    assert ('CPU' in ops) or ('sm_' in ops)
