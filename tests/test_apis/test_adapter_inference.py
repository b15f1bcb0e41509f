"""The frameworks' inference takes an adapter file like a full checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3va_mm.commands import launch
from e3va_mm.errors import CheckpointError
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)

ROOT = Path(__file__).parents[2]
MORE = """
# Not one of another test's: it is the same in the whole process.
visualizer = dict(name='adapter files BY_EPOCH')
test_pipeline = {{_base_.test_dataloader.dataset.pipeline}}
custom_hooks = [dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=BY_EPOCH)]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
"""


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Config, adapter file, the tensors of the full checkpoint, a picture."""
    folder = tmp_path_factory.mktemp('detector')
    make_coco(folder, 'train')
    make_coco(folder, 'val', 2)
    config, _, _ = side_path_config(
        folder,
        detection_config(folder),
        'neck=dict(in_channels=[32, 64, 128, 256]), '
        'test_cfg=dict(rcnn=dict(score_thr=0.))',
        MORE.replace('BY_EPOCH', 'True'),
    )
    return trained(config, 'epoch_1', folder / 'val' / '000.jpg')


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    make_segmentation(folder)
    config, _, _ = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=3, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None",
        MORE.replace('BY_EPOCH', 'False'),
    )
    return trained(config, 'iter_2', folder / 'images' / '000.jpg')


def trained(config, name, picture):
    assert launch.train([str(config)]) == 0
    work = config.parent / 'work'
    full = torch.load(work / f'{name}.pth', weights_only=False)
    adapter = work / f'adapter_{name}.safetensors'
    return str(config), str(adapter), full['state_dict'], str(picture)


def assert_loaded(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert torch.equal(value, state[name]), name


def test_init_detector(detector):
    from mmdet.apis import inference_detector, init_detector

    config, adapter, state, picture = detector
    model = init_detector(config, adapter, device='cpu')
    assert_loaded(model, state)
    assert model.dataset_meta['classes'] == ('cat', 'dog', 'bird')
    assert len(inference_detector(model, picture).pred_instances)


@pytest.mark.parametrize('by', ['config and weights', 'weights alone'])
def test_det_inferencer(detector, by, tmp_path):
    from mmdet.apis import DetInferencer

    config, adapter, state, picture = detector
    inferencer = DetInferencer(
        config if by == 'config and weights' else None,
        adapter,
        device='cpu',
        show_progress=False,
    )
    assert_loaded(inferencer.model, state)
    assert inferencer.model.dataset_meta['classes'] == ('cat', 'dog', 'bird')
    inferencer(picture, out_dir=str(tmp_path))
    assert (tmp_path / 'vis' / '000.jpg').is_file()


def test_init_model(segmentor):
    from mmseg.apis import inference_model, init_model

    config, adapter, state, picture = segmentor
    model = init_model(config, adapter, device='cpu')
    assert_loaded(model, state)
    assert model.dataset_meta['classes'] == ('cat', 'dog', 'bird')
    assert inference_model(model, picture).pred_sem_seg.data.shape[0] == 1


def test_mmseg_inferencer(segmentor, tmp_path):
    from mmseg.apis import MMSegInferencer

    config, adapter, state, picture = segmentor
    inferencer = MMSegInferencer(config, adapter, device='cpu')
    assert_loaded(inferencer.model, state)
    inferencer(picture, out_dir=str(tmp_path), show=False)
    assert (tmp_path / 'vis' / '000.jpg').is_file()


def test_in_a_process_of_its_own(detector):
    """Where nothing but the file's name says what is to be loaded."""
    config, adapter, _, picture = detector
    code = (
        'import sys; from mmdet.apis import init_detector; '
        "model = init_detector(sys.argv[1], sys.argv[2], device='cpu'); "
        'print(model.backbone.trunk_address)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, config, adapter],
        env={
            **os.environ,
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT}/tests/torchvision_first',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith('trunk.safetensors')


def test_heads_of_another_model_are_one_error(detector):
    from mmdet.apis import init_detector

    config, adapter, _, _ = detector
    options = {'model.rpn_head.feat_channels': 24}
    with pytest.raises(CheckpointError, match='4 of another shape'):
        init_detector(config, adapter, device='cpu', cfg_options=options)
