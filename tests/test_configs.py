"""Every config of the repository parses, builds and does a training step."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from e3va_mm.measure import TrainingStep
from e3va_mm.utils import count_parameters

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(CONFIGS.glob('*.py'))


def test_the_sweep_is_not_empty():
    assert len(ALL) >= 2


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_config(path):
    """A step on generated input; the trunk as it is, the pictures small."""
    config = Config.fromfile(path)
    step = TrainingStep(config, 'e3va', size=(192, 256), batch=1, objects=3)
    before = {
        name: parameter.detach().clone()
        for name, parameter in step.model.named_parameters()
        if 'up.q' in name or 'norm3' in name
    }
    assert step.run() > 0
    assert before
    for name, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), name
        if name in before:
            assert not torch.equal(parameter, before[name]), name


def test_swin_l_on_coco_trains_what_is_published():
    step = TrainingStep(
        Config.fromfile(CONFIGS / 'cascade_e3va_swin_l_coco.py'),
        'e3va',
        size=(64, 64),
        batch=1,
    )
    assert count_parameters(step.model.backbone)[1] == 1_792_512


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_header_says_what_it_is(path):
    header = path.read_text().split('"""')[1]
    assert f'python tools/train.py configs/{path.name}' in header
