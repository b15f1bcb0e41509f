import pytest
import torch
from mmengine.config import Config

from e3va_mm.errors import ConfigError
from e3va_mm.measure import TrainingStep
from tests.test_configs import CONFIGS

DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'


@pytest.fixture(scope='module')
def measured():
    figures = {}
    for variant in ('e3va', 'full', 'frozen'):
        step = TrainingStep(
            Config.fromfile(DIGITS), variant, size=(64, 96), batch=1
        )
        figures[variant] = dict(step.parameters(), **step.memory())
    return figures


def test_side_path_trains_what_it_declares(measured):
    # 49.5 values for a channel of each of two taps in each block, and norms.
    blocks = 2 * 32 + 2 * 64 + 4 * 128 + 2 * 256
    norms = 2 * (32 + 64 + 128 + 256)
    assert measured['e3va']['trainable_backbone'] == 99 * blocks + norms
    assert measured['frozen']['trainable_backbone'] == 0
    assert (
        measured['full']['trainable_backbone'] == measured['full']['backbone']
    )
    heads = {
        v: m['trainable'] - m['trainable_backbone']
        for v, m in measured.items()
    }
    assert len(set(heads.values())) == 1, 'neck and heads train alike'


def test_memory_is_accounted_for_what_trains(measured):
    for figures in measured.values():
        assert figures['gradients'] == 4 * figures['trainable']
        # AdamW: two moments and a step count for each parameter.
        assert 0 <= figures['optimizer'] - 8 * figures['trainable'] < 4000
        assert figures['peak'] > sum(
            figures[k] for k in ('weights', 'gradients', 'optimizer')
        )


def test_a_side_path_costs_less_than_fine_tuning(measured):
    assert (
        measured['frozen']['peak']
        < measured['e3va']['peak']
        < measured['full']['peak']
    )


def test_a_step_trains():
    step = TrainingStep(
        Config.fromfile(DIGITS), 'e3va', size=(64, 64), batch=1
    )
    side = step.model.backbone.side_path.stages[0][0]['attn'].up
    assert not side.q.any()
    assert step.run() > 0
    assert side.q.any()


def test_pictures_have_the_size_of_the_pipeline():
    config = Config.fromfile(DIGITS)
    step = TrainingStep(config, 'frozen')
    assert len(step.data['inputs']) == 4
    assert step.data['inputs'][0].shape == (3, 224, 224)
    assert not any(p.requires_grad for p in step.model.backbone.parameters())
    for transform in config.train_dataloader.dataset.pipeline:
        transform.pop('scale', None)
    with pytest.raises(ConfigError, match='Give it with --size'):
        TrainingStep(config, 'frozen')


def test_variants_get_the_same_pictures():
    ours, full = (
        TrainingStep(Config.fromfile(DIGITS), v, size=(32, 32), batch=1)
        for v in ('e3va', 'full')
    )
    assert torch.equal(ours.data['inputs'][0], full.data['inputs'][0])
    boxes = [
        step.data['data_samples'][0].gt_instances.bboxes.tensor
        for step in (ours, full)
    ]
    assert torch.equal(*boxes)


def test_sizes_are_found_in_wrapped_data_sets_and_in_one_number():
    config = Config.fromfile(DIGITS)
    inner = config.train_dataloader.dataset
    for transform in inner.pipeline:
        if 'scale' in transform:
            transform['scale'] = 96
    config.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[inner]),
    )
    step = TrainingStep(config, 'frozen', batch=1)
    assert step.data['inputs'][0].shape == (3, 96, 96)
