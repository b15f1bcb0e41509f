"""Checkpoints and adapter files through the frameworks' own inference."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from e3va_mm.errors import CheckpointError
from tests.test_configs import CONFIGS
from tests.test_weights.hostile import FORMS, touch

ROOT = Path(__file__).parents[2]
FILES = ['checkpoint', 'adapter']


@pytest.fixture(params=FILES)
def file(request):
    return request.param


def assert_loaded(model, trained):
    """Every tensor is that of the file, and nothing trains."""
    state = torch.load(trained.checkpoint, weights_only=False)['state_dict']
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert torch.equal(value, state[name]), name
    assert own['backbone.side_path.stages.3.up.q'].any()
    assert not any(module.training for module in model.modules())
    assert model.dataset_meta['classes'] == ('cat', 'dog', 'bird')


def test_init_detector(detector, detections, file):
    from mmdet.apis import inference_detector, init_detector

    config = Config.fromfile(detector.config)
    # Each file alone brings the trunk.
    config.model.backbone.init_cfg.checkpoint = 'none.safetensors'
    path = getattr(detector, file)
    model = init_detector(config, path, device='cpu')
    assert_loaded(model, detector)
    found = inference_detector(model, detector.image).pred_instances
    assert torch.equal(found.labels, detections['labels'])
    torch.testing.assert_close(found.scores, detections['scores'])
    torch.testing.assert_close(found.bboxes, detections['bboxes'])


@pytest.mark.parametrize('with_config', [True, False])
def test_det_inferencer(detector, detections, file, with_config, tmp_path):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(
        detector.config if with_config else None,
        getattr(detector, file),
        device='cpu',
        show_progress=False,
    )
    assert_loaded(inferencer.model, detector)
    found = inferencer(
        detector.image, out_dir=str(tmp_path), no_save_pred=False
    )['predictions'][0]
    assert found['labels'] == detections['labels'].tolist()
    assert (tmp_path / 'vis' / '000.jpg').is_file()
    assert (tmp_path / 'preds' / '000.json').is_file()


def test_init_model(segmentor, classes, file):
    from mmseg.apis import inference_model, init_model

    path = getattr(segmentor, file)
    model = init_model(segmentor.config, path, device='cpu')
    assert_loaded(model, segmentor)
    found = inference_model(model, segmentor.image).pred_sem_seg.data
    assert np.array_equal(found.numpy()[0], classes)


def test_mmseg_inferencer(segmentor, classes, file, tmp_path):
    from mmseg.apis import MMSegInferencer

    path = getattr(segmentor, file)
    inferencer = MMSegInferencer(segmentor.config, path, device='cpu')
    assert_loaded(inferencer.model, segmentor)
    found = inferencer(segmentor.image, out_dir=str(tmp_path), show=False)
    assert np.array_equal(found['predictions'], classes)
    assert (tmp_path / 'vis' / '000.jpg').is_file()


def in_a_process(code, *arguments):
    return subprocess.run(
        [sys.executable, '-c', code, *arguments],
        env={
            **os.environ,
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT}/tests/torchvision_first',
        },
        capture_output=True,
        text=True,
    )


def test_an_adapter_file_in_a_process_of_its_own(detector):
    """Where nothing but the file's name says what is to be loaded."""
    done = in_a_process(
        'import sys; from mmdet.apis import init_detector; '
        "model = init_detector(sys.argv[1], sys.argv[2], device='cpu'); "
        'print(model.backbone.trunk_address)',
        *(detector.config, detector.adapter),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == detector.trunk


@pytest.mark.parametrize(
    'framework, inferencer, config',
    [
        ('mmdet', 'DetInferencer', 'cascade_e3va_swin_nano_digits.py'),
        ('mmseg', 'MMSegInferencer', 'upernet_e3va_swin_nano_digits.py'),
    ],
)
def test_a_hostile_file_in_a_process_of_its_own(
    framework, inferencer, config, tmp_path
):
    """The inferencers read the file before the model imports us."""
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_state_dict'](path, touch(marker))
    done = in_a_process(
        f'from {framework}.apis import {inferencer} as use; import sys; '
        "use(sys.argv[1], sys.argv[2], device='cpu')",
        *(CONFIGS / config, path),
    )
    assert 'could run code' in done.stderr
    assert not marker.exists()


def test_heads_of_another_model_are_one_error(detector):
    from mmdet.apis import init_detector

    options = {'model.rpn_head.feat_channels': 24}
    with pytest.raises(CheckpointError, match='4 of another shape'):
        init_detector(
            detector.config,
            detector.adapter,
            device='cpu',
            cfg_options=options,
        )
