"""What a step needs, by hand arithmetic, and that the advice works."""

import pytest
from mmengine.config import Config

from e3va_mm.engine.activation_checkpointing import is_checkpointed
from e3va_mm.measure import TrainingStep
from e3va_mm.measure.fits import (
    changes,
    margin_text,
    needed_bytes,
    updated_at_once,
)
from tests.test_configs import CONFIGS

MIB = 2**20
DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'
FOREACH = 'optim_wrapper = dict(optimizer=dict(foreach=False))'
PARAMETERS = dict(
    total=25 * MIB,
    trainable=10 * MIB,
    backbone=200 * MIB,
    trainable_backbone=0,
)


def memory(**figures):
    """4000 MiB: 1000 each of weights, optimizer and kept, 500 of others."""
    found = dict(
        weights=1000 * MIB,
        optimizer=1000 * MIB,
        gradients=500 * MIB,
        kept=1000 * MIB,
        temporaries=500 * MIB,
        peak=4000 * MIB,
        kept_modules={
            'backbone.side_path.stages.0': 300 * MIB,
            'neck.fpn_convs.0': 400 * MIB,
            'roi_head.bbox_head.1.shared_fcs.0': 200 * MIB,
            'roi_head.bbox_head.1.loss_cls': 50 * MIB,
            'rpn_head': 30 * MIB,
            'data_preprocessor': 70 * MIB,
            'roi_head.bbox_roi_extractor': 60 * MIB,
            '': 20 * MIB,
        },
    )
    return found | figures


def digits(**options):
    config = Config.fromfile(DIGITS)
    config.merge_from_dict(options)
    return config


def lines(config, figures=None, **parameters):
    found = changes(config, figures or memory(), {**PARAMETERS, **parameters})
    return [change.lines for change in found]


def test_a_step_needs_its_peak_and_a_margin():
    # 4000 MiB, a tenth of it, a quarter and a half of 1024.
    assert needed_bytes(memory()) == (4400 + 256 + 512) * MIB
    text = margin_text(memory())
    assert '10%' in text and '0.25 GiB' in text and '0.5 GiB' in text


@pytest.mark.parametrize('reserved, peak', [(5000, 4950), (4600, 4600)])
def test_on_cuda_the_allocator_decides(reserved, peak):
    found = memory(allocated=4500 * MIB, reserved=reserved * MIB)
    assert needed_bytes(found) == (peak + 512) * MIB
    assert needed_bytes(found, 300 * MIB) == needed_bytes(found)
    assert 'workspaces' not in margin_text(found)


def test_an_update_of_all_weights_at_once_may_be_the_peak():
    """On CUDA: weights, state, gradients, and as much again."""
    needed = (2000 + 2 * 4 * 300) * 1.1 + 768
    assert needed_bytes(memory(), 300 * MIB) == pytest.approx(needed * MIB)
    assert needed_bytes(memory(), 200 * MIB) == needed_bytes(memory())
    config = digits()
    assert updated_at_once(config, PARAMETERS) == 10 * MIB
    assert FOREACH not in lines(config)
    assert FOREACH in lines(config, trainable=300 * MIB)
    config.optim_wrapper.optimizer.foreach = False
    assert updated_at_once(config, PARAMETERS) == 0
    assert FOREACH not in lines(config, trainable=300 * MIB)


def test_a_peak_in_the_update_has_no_activations():
    """Of the 1070 MiB that forward kept, 40 are left."""
    figures = memory(kept=40 * MIB, peak=3040 * MIB)
    first, second = changes(digits(), figures, PARAMETERS)
    assert 'trunk_weights' in first.lines
    assert (second.addresses, second.lines) == (500 * MIB, FOREACH)


def test_changes_are_those_of_the_figures_largest_first():
    found = changes(digits(), memory(), PARAMETERS)
    sizes = [change.addresses // MIB for change in found]
    # Activations, weights in fp32, half of the images, neck and two heads,
    # side path.
    assert sizes == [1500, 800, 750, 680, 300]
    text = '\n'.join(change.lines for change in found)
    for part in (
        'AmpOptimWrapper',
        'batch_size=2',
        'accumulative_counts=2',
        "trunk_weights='bf16'",
        "modules=['neck', 'roi_head.bbox_head.1', 'rpn_head']",
        "preset='lean'",
    ):
        assert part in text


def test_nothing_is_proposed_that_the_config_has():
    config = digits(
        **{
            'model.backbone.tuner': dict(preset='lean'),
            'optim_wrapper.type': type('AmpOptimWrapper', (), {}),
            'train_dataloader.batch_size': 1,
            'custom_hooks': [
                dict(
                    type=type('ActivationCheckpointHook', (), {}),
                    modules=['neck'],
                )
            ],
        }
    )
    assert lines(config) == []
    config.model.pop('backbone')
    assert lines(config) == []


def test_a_smaller_batch_keeps_the_product():
    changed = digits(
        **{
            'optim_wrapper.accumulative_counts': 3,
            'train_cfg': dict(
                _delete_=True, type='IterBasedTrainLoop', max_iters=600
            ),
        }
    )
    (found,) = (
        change
        for change in changes(changed, memory(), PARAMETERS)
        if 'batch_size' in change.lines
    )
    assert found.lines == (
        'train_dataloader = dict(batch_size=2)\n'
        'optim_wrapper = dict(accumulative_counts=6)'
    )
    assert 'multiply max_iters and schedules by 2' in found.reason
    changed.train_dataloader.batch_size = 2
    assert any('batch_size=1' in line for line in lines(changed))
    changed.default_scope = 'mmseg'  # its batch norms need two images
    assert not any('batch_size' in line for line in lines(changed))


def test_modules_of_a_list_have_their_paths():
    config = digits()
    config.model.auxiliary_head = [dict(type='FCNHead'), dict(type='FCNHead')]
    figures = memory(
        kept_modules={'auxiliary_head': MIB, 'roi_head.mask_head': MIB}
    )
    paths = "modules=['auxiliary_head.*', 'roi_head.mask_head.*']"
    assert any(paths in line for line in lines(config, figures))


def test_a_backbone_that_trains_as_a_whole_may_be_frozen():
    config = digits(**{'model.backbone.type': 'mmdet.SwinTransformer'})
    counts = dict(trainable=100 * MIB, backbone=75 * MIB)
    counts['trainable_backbone'] = 75 * MIB
    (change,) = (
        change
        for change in changes(config, memory(), counts)
        if 'backbone' in change.lines
    )
    assert "type='e3va_mm.E3VASwinTransformer'" in change.lines
    # Kept, four bytes of gradients each, three quarters of the state.
    assert change.addresses == (300 + 4 * 75 + 750) * MIB
    assert not any(
        'backbone' in line for line in lines(config, trainable_backbone=0)
    )
    config.model.backbone.type = 'mmdet.ResNet'
    assert not any('backbone' in line for line in lines(config, **counts))


def test_every_line_works_and_lowers_the_need(tmp_path):
    """Pasted one by one into a child of the measured config."""
    small = dict(size=(96, 96), batch=2)
    step = TrainingStep(Config.fromfile(DIGITS), **small)
    before = step.memory()
    config = digits(**{'train_dataloader.batch_size': 2})
    found = changes(config, before, step.parameters())
    assert len(found) == 6
    for i, change in enumerate(found):
        path = tmp_path / f'child_{i}.py'
        path.write_text(f"_base_ = '{DIGITS}'\n{change.lines}\n")
        child = Config.fromfile(path)
        if change.lines == FOREACH:  # nothing on a CPU
            assert child.optim_wrapper.optimizer.foreach is False
            continue
        batch = 1 if 'batch_size' in change.lines else 2
        changed = TrainingStep(child, size=(96, 96), batch=batch)
        if 'ActivationCheckpointHook' in change.lines:
            *others, _ = child.custom_hooks
            assert others == config.custom_hooks
            assert any(map(is_checkpointed, changed.model.modules()))
        after = changed.memory()
        assert after['peak'] < before['peak'], change.lines
