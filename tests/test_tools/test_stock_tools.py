"""One changed line under the frameworks' own train.py, nothing else."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)

ROOT = Path(__file__).parents[2]


def stock_train(framework, config):
    package = Path(importlib.util.find_spec(framework).origin).parent
    return subprocess.run(
        [sys.executable, package / '.mim' / 'tools' / 'train.py', config],
        # In place of an installed package, and of a torchvision that loads.
        env={
            **os.environ,
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT}/tests/torchvision_first',
        },
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
def test_side_path_learns_and_trunk_stays(framework, tmp_path):
    if framework == 'mmdet':
        make_coco(tmp_path, 'train')
        make_coco(tmp_path, 'val')
        base = detection_config(tmp_path)
        head = 'neck=dict(in_channels=[32, 64, 128, 256])'
    else:
        make_segmentation(tmp_path)
        base = segmentation_config(tmp_path)
        head = (
            'decode_head=dict(in_channels=256, in_index=3), '
            'auxiliary_head=None'
        )
    more = f"""
custom_hooks = [dict(type='e3va_mm.TrainableTableHook'),
                dict(type='e3va_mm.DatasetCheckHook')]
# A stock Swin config may stop the learning of all that is called backbone.
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.))))
work_dir = {str(tmp_path / 'work')!r}
"""
    config, _, trunk = side_path_config(tmp_path, base, head, more)
    done = stock_train(framework, config)
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert 'Trainable in the backbone: ' in log
    assert 'backbone (side path)' in log
    last = (tmp_path / 'work' / 'last_checkpoint').read_text()
    state = torch.load(last, weights_only=False)['state_dict']
    compared = 0
    for name, value in trunk.items():
        if not name.startswith('norm'):
            assert torch.equal(state[f'backbone.{name}'], value), name
            compared += 1
    assert compared == 97
    up = 'backbone.side_path.stages.3.up.q'
    assert state[up].any(), 'the side path has not learned'
