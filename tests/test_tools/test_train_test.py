"""The tools as a user runs them: each in a process of its own."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from e3va_mm.commands import launch
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    truncate,
)

TOOLS = Path(__file__).parents[2] / 'tools'


def run(tool, *arguments, cwd):
    """Run a tool from a plain clone: the package is not installed."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != 'PYTHONPATH'
    }
    return subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def error_of(process):
    """What the user reads at the end; never a stack trace."""
    assert process.returncode == 1, process.stderr
    assert 'Traceback' not in process.stderr + process.stdout
    return process.stderr[process.stderr.index('error: ') :]


@pytest.fixture
def folder(tmp_path):
    make_coco(tmp_path, 'train', suffix='.jpg')
    make_coco(tmp_path, 'val', 2, suffix='.png')
    return tmp_path


def test_wrong_class_count(folder):
    process = run(
        'train.py',
        detection_config(folder),
        '--cfg-options',
        'model.roi_head.bbox_head.1.num_classes=80',
        cwd=folder,
    )
    text = error_of(process)
    assert text.startswith(
        'error: train_dataloader.dataset has 3 classes '
        "('cat', 'dog', 'bird'), but the heads of the model"
    )
    assert (
        'model.roi_head.bbox_head.1.num_classes: expected 3, received 80'
        in text
    )
    assert 'Epoch(train)' not in process.stdout


def test_missing_pictures(folder):
    for name in ('train/001.jpg', 'train/003.jpg', 'val/000.png'):
        (folder / name).unlink()
    process = run('train.py', detection_config(folder), cwd=folder)
    text = error_of(process)
    assert '3 of 6 files that the data names do not exist' in text
    for name, prefix in (
        ('train/001.jpg', 'train'),
        ('train/003.jpg', 'train'),
        ('val/000.png', 'val'),
    ):
        assert (
            f'{folder}/{name}  [{prefix}_dataloader.dataset.data_prefix.img]'
        ) in text
    assert 'Epoch(train)' not in process.stdout


def test_truncated_pictures(folder):
    names = ('train/002.jpg', 'val/001.png')
    for name in names:
        truncate(folder / name)
    process = run('train.py', detection_config(folder), cwd=folder)
    text = error_of(process)
    assert '2 of 6 files are damaged' in text
    for name in names:
        assert (
            f'{folder}/{name}: cannot be decoded, image file is truncated'
        ) in text
    assert 'Epoch(train)' not in process.stdout


def test_resume_and_test_a_detector(folder):
    config = detection_config(folder)
    assert launch.train([config]) == 0
    process = run(
        'train.py',
        config,
        '--resume',
        '--cfg-options',
        'train_cfg.max_epochs=2',
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    assert 'Trainable in the backbone: ' in process.stdout
    assert 'Epoch(train) [2][2/2]' in process.stdout
    assert 'Epoch(train) [1][' not in process.stdout

    process = run(
        'test.py',
        config,
        folder / 'work' / 'epoch_2.pth',
        '--out',
        folder / 'predictions.pkl',
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    assert 'Checked 2 files' in process.stdout
    assert 'coco/bbox_mAP' in process.stdout
    predictions = pickle.loads((folder / 'predictions.pkl').read_bytes())
    assert [p['img_id'] for p in predictions] == [0, 1]


def test_train_and_test_a_segmentor(tmp_path):
    make_segmentation(tmp_path)
    config = segmentation_config(tmp_path)
    assert launch.train([config, '--work-dir', str(tmp_path / 'here')]) == 0
    out = tmp_path / 'maps_out'
    checkpoint = tmp_path / 'here' / 'iter_2.pth'
    assert (
        launch.test([config, str(checkpoint), '--out', str(out), '--tta']) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [
        f'{i:03}.png' for i in range(4)
    ]


def test_no_tool_hides_a_standard_module():
    names = {path.stem for path in TOOLS.glob('*.py')} - {'test'}
    assert 'train' in names
    assert not names & sys.stdlib_module_names
