"""A file that runs a command wherever it is unpickled, given to a tool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_engine.test_hooks.tiny import make_coco
from tests.test_weights.hostile import FORMS, touch

pytest.importorskip('mmdet')

ROOT = Path(__file__).parents[2]


def _test(checkpoint, folder):
    """Run tools/test.py on the digits config and two pictures."""
    options = {
        'test_dataloader.dataset.data_root': f'{folder}/',
        'test_dataloader.dataset.ann_file': 'test.json',
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'test_evaluator.ann_file': folder / 'test.json',
    }
    return subprocess.run(
        [
            sys.executable,
            ROOT / 'tools' / 'test.py',
            ROOT / 'configs' / 'cascade_e3va_swin_nano_digits.py',
            checkpoint,
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hostile_checkpoint_is_one_error_and_does_not_run(tmp_path):
    make_coco(tmp_path, 'test', 2, classes=tuple('0123456789'))
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_meta'](path, touch(marker))

    process = _test(path, tmp_path)
    assert process.returncode == 1, process.stderr
    assert not marker.exists()
    assert 'Traceback' not in process.stdout + process.stderr
    assert process.stderr.splitlines()[-1] == (
        f'error: {path} names {os.system.__module__}.system, which is not on '
        'the list of what a checkpoint may hold; it could run code and was '
        'not read. Do not unpickle this file. Ask its author for the weights '
        'alone, saved as .safetensors or as a plain state dict.'
    )
    # The payload does work where a file is unpickled.
    torch.load(path, weights_only=False)
    assert marker.exists()
