"""A checkpoint of ours through the frameworks' own ways to use one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from e3va_mm.errors import CheckpointError
from tests.test_configs import CONFIGS
from tests.test_weights.hostile import FORMS, touch

ROOT = Path(__file__).parents[2]


def assert_loaded(model, checkpoint):
    """Every tensor is that of the file, and nothing trains."""
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert torch.equal(value, state[name]), name
    assert own['backbone.side_path.stages.3.0.ffn.up.q'].any()
    assert not any(module.training for module in model.modules())


def test_init_detector(detector, detections):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(detector.config, detector.checkpoint, device='cpu')
    assert_loaded(model, detector.checkpoint)
    assert model.dataset_meta['classes'] == ('cat', 'dog', 'bird')
    found = inference_detector(model, detector.picture).pred_instances
    assert torch.equal(found.labels, detections['labels'])
    torch.testing.assert_close(found.scores, detections['scores'])
    torch.testing.assert_close(found.bboxes, detections['bboxes'])


@pytest.mark.parametrize('by', ['config and weights', 'weights alone'])
def test_det_inferencer(detector, detections, by, tmp_path):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(
        detector.config if by == 'config and weights' else None,
        detector.checkpoint,
        device='cpu',
        show_progress=False,
    )
    assert_loaded(inferencer.model, detector.checkpoint)
    found = inferencer(
        detector.picture, out_dir=str(tmp_path), no_save_pred=False
    )['predictions'][0]
    assert found['labels'] == detections['labels'].tolist()
    torch.testing.assert_close(
        torch.tensor(found['scores']), detections['scores']
    )
    assert (tmp_path / 'vis' / '000.jpg').is_file()
    assert (tmp_path / 'preds' / '000.json').is_file()


def test_init_model(segmentor, classes):
    from mmseg.apis import inference_model, init_model

    model = init_model(segmentor.config, segmentor.checkpoint, device='cpu')
    assert_loaded(model, segmentor.checkpoint)
    found = inference_model(model, segmentor.picture).pred_sem_seg.data
    assert np.array_equal(found.numpy()[0], classes)


def test_mmseg_inferencer(segmentor, classes, tmp_path):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(
        segmentor.config, segmentor.checkpoint, device='cpu'
    )
    assert_loaded(inferencer.model, segmentor.checkpoint)
    found = inferencer(segmentor.picture, out_dir=str(tmp_path), show=False)[
        'predictions'
    ]
    assert np.array_equal(found, classes)
    assert (tmp_path / 'vis' / '000.jpg').is_file()


def test_a_file_that_could_run_code(detector, tmp_path):
    from mmdet.apis import DetInferencer, init_detector

    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_state_dict'](path, touch(marker))
    for use in (init_detector, DetInferencer):
        with pytest.raises(CheckpointError, match='could run code'):
            use(detector.config, str(path), device='cpu')
    assert not marker.exists()


@pytest.mark.parametrize(
    'framework, inferencer, config',
    [
        ('mmdet', 'DetInferencer', 'cascade_e3va_swin_nano_digits.py'),
        ('mmseg', 'MMSegInferencer', 'upernet_e3va_swin_nano_digits.py'),
    ],
)
def test_a_hostile_file_alone_in_a_process(
    framework, inferencer, config, tmp_path
):
    """The inferencers read the file before the model imports us."""
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_state_dict'](path, touch(marker))
    code = (
        f'from {framework}.apis import {inferencer} as use; import sys; '
        "use(sys.argv[1], sys.argv[2], device='cpu')"
    )
    done = subprocess.run(
        [sys.executable, '-c', code, CONFIGS / config, path],
        cwd=tmp_path,
        env={
            **os.environ,
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT}/tests/torchvision_first',
        },
        capture_output=True,
        text=True,
    )
    assert 'could run code' in done.stderr
    assert not marker.exists()
