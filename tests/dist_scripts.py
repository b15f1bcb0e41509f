"""The scripts that start several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launched(script, *arguments, cwd):
    """From a folder that holds the data and no part of the project."""
    return subprocess.run(
        ['bash', ROOT / 'tools' / f'{script}.sh', *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            'CUDA_VISIBLE_DEVICES': '',
            'OMP_NUM_THREADS': '1',
            'PYTHON': sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
