"""Which cards hold a step, by hand arithmetic, and that the advice works."""

import pytest
from mmengine.config import Config

from e3va_mm.engine.checkpointing import is_checkpointed
from e3va_mm.errors import ConfigError
from e3va_mm.measure import TrainingStep
from e3va_mm.measure.fits import fits, kept_by_part, margin_text, needed_bytes
from tests.test_configs import CONFIGS

MIB, GIB = 2**20, 2**30
DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'


def memory(**figures):
    """4000 MiB: 1000 each of weights, optimizer and kept, 500 of others."""
    found = dict(
        weights=1000 * MIB,
        optimizer=1000 * MIB,
        gradients=500 * MIB,
        kept=1000 * MIB,
        temporaries=500 * MIB,
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
    found['peak'] = 4000 * MIB
    return found | figures


def digits(**changes):
    config = Config.fromfile(DIGITS)
    config.merge_from_dict(changes)
    return config


def test_a_card_holds_peak_and_margin_and_not_a_byte_less():
    # 4000 MiB, a tenth of it, a quarter and a half of 1024.
    needed = 4400 + 256 + 512
    assert needed_bytes(memory()) == needed * MIB
    exact = needed / 1024
    verdicts = fits(memory(), [exact, exact - 1e-6, 6])
    assert [v.holds for v in verdicts] == [True, False, True]
    assert [v.size for v in verdicts] == [exact, exact - 1e-6, 6]
    assert {v.needed for v in verdicts} == {needed * MIB}
    text = margin_text(memory())
    assert '10%' in text and '0.25 GiB' in text and '0.5 GiB' in text


@pytest.mark.parametrize('reserved, peak', [(5000, 4950), (4600, 4600)])
def test_on_cuda_the_allocator_is_believed(reserved, peak):
    found = memory(allocated=4500 * MIB, reserved=reserved * MIB)
    assert needed_bytes(found) == (peak + 512) * MIB
    assert 'workspaces' not in margin_text(found)


@pytest.mark.parametrize('size', [0, -8, float('nan')])
def test_sizes_are_above_zero(size):
    with pytest.raises(ConfigError, match=f'above zero, but got {size}'):
        fits(memory(), [8, size])


def test_bytes_kept_are_summed_to_what_can_be_named():
    assert list(kept_by_part(memory()['kept_modules']).items()) == [
        ('neck', 400 * MIB),
        ('backbone', 300 * MIB),
        ('roi_head.bbox_head.1', 250 * MIB),
        ('data_preprocessor', 70 * MIB),
        ('roi_head.bbox_roi_extractor', 60 * MIB),
        ('rpn_head', 30 * MIB),
        ('', 20 * MIB),
    ]
    names = {
        'auxiliary_head.1.convs.0.conv': 'auxiliary_head.1',
        'decode_head.psp_modules.0': 'decode_head',
        'roi_head.mask_head.convs.0': 'roi_head.mask_head',
        'roi_head': 'roi_head',
    }
    for path, name in names.items():
        assert kept_by_part({path: 1}) == {name: 1}


def test_changes_are_those_of_the_figures_largest_first():
    parameters = dict(
        total=25 * MIB,
        trainable=10 * MIB,
        backbone=200 * MIB,
        trainable_backbone=0,
    )
    (verdict,) = fits(memory(), [4], digits(), parameters)
    sizes = [change.addresses // MIB for change in verdict.changes]
    # Activations, those of 3 of 4 pictures, weights in fp32, neck and two
    # heads, side path.
    assert sizes == [1500, 1125, 800, 680, 300]
    lines = '\n'.join(change.lines for change in verdict.changes)
    for part in (
        'AmpOptimWrapper',
        'batch_size=1',
        'accumulative_counts=4',
        "trunk_weights='bf16'",
        "modules=['neck', 'roi_head.bbox_head.1', 'rpn_head']",
        "preset='lean'",
    ):
        assert lines.count(part) == 1


@pytest.mark.parametrize(
    'path, module',
    [
        # One config for all stages of a cascade.
        ('roi_head.mask_head', 'roi_head.mask_head.*'),
        ('roi_head.mask_head.1.convs', 'roi_head.mask_head.1'),
        ('auxiliary_head.convs', 'auxiliary_head'),
        ('neck.lateral_convs', 'neck'),
    ],
)
def test_modules_are_named_as_they_are_called(path, module):
    figures = memory(kept_modules={path: MIB})
    (verdict,) = fits(figures, [4], digits())
    assert any(f'modules={[module]!r}' in c.lines for c in verdict.changes)


def test_heads_in_a_list_are_named_one_by_one():
    config = digits()
    config.model.auxiliary_head = [dict(type='FCNHead'), dict(type='FCNHead')]
    figures = memory(kept_modules={'auxiliary_head': MIB})
    (verdict,) = fits(figures, [4], config)
    assert any("['auxiliary_head.*']" in c.lines for c in verdict.changes)


def test_classes_and_missing_parts_in_configs():
    """New-style configs hold classes; some models have no backbone."""
    config = digits()
    config.optim_wrapper.type = type('AmpOptimWrapper', (), {})
    config.custom_hooks = [
        dict(type=type('ActivationCheckpointHook', (), {}), modules=['neck'])
    ]
    config.model.pop('backbone')
    (verdict,) = fits(memory(), [4], config)
    assert len(verdict.changes) == 1 and 'batch' in verdict.changes[0].lines


def test_nothing_is_proposed_that_the_config_has():
    config = digits(
        **{
            'model.backbone.side_path': dict(preset='lean'),
            'optim_wrapper.type': 'AmpOptimWrapper',
            'train_dataloader.batch_size': 1,
            'custom_hooks': [
                dict(type='e3va_mm.ActivationCheckpointHook', modules=['neck'])
            ],
        }
    )
    (verdict,) = fits(memory(), [1], config)
    assert not verdict.holds and verdict.changes == ()


def smaller(figures, size, parameters=None, **changes):
    (verdict,) = fits(figures, [size], digits(**changes), parameters)
    found = [c for c in verdict.changes if 'batch_size' in c.lines]
    return found[0] if found else None


def test_the_largest_batch_that_fits_keeps_the_product():
    # Weights, optimizer and gradients stay; of four pictures' 1500 MiB two
    # leave 750, one 375. Needs: 3250 * 1.1 + 768, and 2875 * 1.1 + 768.
    two, one = (3250 * 1.1 + 768) / 1024, (2875 * 1.1 + 768) / 1024
    change = smaller(memory(), two + 1e-3)
    assert change.lines == (
        'train_dataloader = dict(batch_size=2)\n'
        'optim_wrapper = dict(accumulative_counts=2)'
    )
    assert change.addresses == 750 * MIB
    change = smaller(memory(), two - 1e-3)
    assert 'batch_size=1)' in change.lines
    assert 'accumulative_counts=4)' in change.lines
    assert smaller(memory(), one - 1e-3) is None

    change = smaller(
        memory(), two + 1e-3, **{'optim_wrapper.accumulative_counts': 3}
    )
    assert 'accumulative_counts=6)' in change.lines
    # Three does not divide four.
    assert 'batch_size=2' in smaller(memory(), 4.9).lines


def test_accumulated_gradients_are_whole_when_the_next_step_begins():
    two = (3250 * 1.1 + 768) / 1024
    # 4 bytes for each, 100 MiB more than at the peak without accumulation.
    parameters = dict(trainable=150 * MIB)
    assert 'batch_size=1' in smaller(memory(), two, parameters).lines
    assert 'batch_size=2' in smaller(memory(), two + 0.11, parameters).lines


def test_a_smaller_batch_on_cuda_shrinks_what_was_allocated():
    figures = memory(allocated=4400 * MIB, reserved=8000 * MIB)
    two = (3250 * 1.1 * 1.1 + 512) / 1024
    assert 'batch_size=2' in smaller(figures, two + 1e-3).lines
    assert 'batch_size=1' in smaller(figures, two - 1e-3).lines


def test_an_update_of_all_weights_at_once_may_be_the_peak():
    """On CUDA: weights, state, gradients, and as much again."""
    update = 2000 + 2 * 4 * 300
    needed = update * 1.1 + 768
    assert needed_bytes(memory(), 300 * MIB) == pytest.approx(needed * MIB)
    assert needed_bytes(memory(), 200 * MIB) == needed_bytes(memory())
    # What was measured on CUDA has it.
    on_cuda = memory(allocated=4500 * MIB, reserved=5000 * MIB)
    assert needed_bytes(on_cuda, 300 * MIB) == needed_bytes(on_cuda)


FOREACH = 'optim_wrapper = dict(optimizer=dict(foreach=False))'


def lines(figures, size, parameters, config):
    (verdict,) = fits(figures, [size], config, parameters)
    assert not verdict.holds
    return [change.lines for change in verdict.changes]


def test_updates_one_by_one_may_be_enough():
    # 2000 + 2400 at once, 4000 before: each with its margin.
    at_once = (4400 * 1.1 + 768) / 1024
    before = (4000 * 1.1 + 768) / 1024
    parameters = dict(trainable=300 * MIB, trainable_backbone=0)
    config = digits()
    assert fits(memory(), [at_once], config, parameters)[0].holds
    assert lines(memory(), at_once - 1e-3, parameters, config) == [FOREACH]
    assert lines(memory(), before, parameters, config) == [FOREACH]
    # If they are not, they stand beside the others.
    found = lines(memory(), before - 1e-3, parameters, config)
    assert FOREACH in found and len(found) > 2
    config.optim_wrapper.optimizer.foreach = False
    assert fits(memory(), [before], config, parameters)[0].holds
    found = lines(memory(), before - 1e-3, parameters, config)
    assert FOREACH not in found and len(found) > 1


def test_a_peak_in_the_update_has_no_activations():
    """Of the 1070 MiB that forward kept, 40 are left."""
    figures = memory(kept=40 * MIB, peak=3040 * MIB)
    parameters = dict(trainable=100 * MIB, trainable_backbone=0)
    config = digits()
    (verdict,) = fits(figures, [2], config, parameters)
    assert [(c.addresses, c.lines) for c in verdict.changes] == [
        (500 * MIB, FOREACH)
    ]
    parameters['backbone'] = 50 * MIB
    found = lines(figures, 2, parameters, config)
    assert found[0] == FOREACH and 'trunk_weights' in found[1]
    config.optim_wrapper.optimizer.foreach = False
    (found,) = lines(figures, 2, parameters, config)
    assert 'trunk_weights' in found


def test_segmentors_keep_two_pictures_and_iterations_are_counted():
    changes = dict(
        default_scope='mmseg',
        train_cfg=dict(
            _delete_=True, type='IterBasedTrainLoop', max_iters=600
        ),
    )
    # Two pictures need 4.24 GiB.
    change = smaller(memory(), 4.3, **changes)
    assert 'batch_size=2' in change.lines
    assert 'multiply max_iters and schedules by 2' in change.reason
    assert smaller(memory(), 4.2, **changes) is None
    assert 'batch_size=1' in smaller(memory(), 4.2).lines


def test_a_backbone_that_trains_as_a_whole_may_be_frozen():
    config = digits(**{'model.backbone.type': 'mmdet.SwinTransformer'})
    parameters = dict(
        trainable=100 * MIB, trainable_backbone=75 * MIB, backbone=75 * MIB
    )
    (verdict,) = fits(memory(), [4], config, parameters)
    (change,) = (c for c in verdict.changes if 'backbone' in c.lines)
    assert "type='e3va_mm.E3VASwinTransformer'" in change.lines
    # Kept, four bytes of gradients each, three quarters of the state.
    assert change.addresses == (300 + 4 * 75 + 750) * MIB

    parameters['trainable_backbone'] = 0
    (verdict,) = fits(memory(), [4], config, parameters)
    assert not any('backbone' in c.lines for c in verdict.changes)
    config.model.backbone.type = 'mmdet.ResNet'
    parameters['trainable_backbone'] = 75 * MIB
    (verdict,) = fits(memory(), [4], config, parameters)
    assert not any('backbone' in c.lines for c in verdict.changes)


def test_every_line_works_and_lowers_the_need(tmp_path):
    """Pasted one by one into a child of the measured config."""
    step = TrainingStep(Config.fromfile(DIGITS), size=(160, 160), batch=2)
    before = step.memory()
    config = digits(**{'train_dataloader.batch_size': 2})
    # With this card the batch has to be halved.
    trainable = step.parameters()['trainable']
    size = (needed_bytes(before, trainable) - 1) / GIB
    (verdict,) = fits(before, [size], config, step.parameters())
    assert len(verdict.changes) == 5
    for i, change in enumerate(verdict.changes):
        path = tmp_path / f'child_{i}.py'
        path.write_text(f"_base_ = '{DIGITS}'\n{change.lines}\n")
        child = Config.fromfile(path)
        batch = 1 if 'batch_size' in change.lines else 2
        amp = 'Amp' in change.lines
        child.optim_wrapper.pop('accumulative_counts', None)
        if amp:  # needs a GPU; the step has mixed precision for CPUs too
            assert child.optim_wrapper.type == 'AmpOptimWrapper'
            child.optim_wrapper.type = 'OptimWrapper'
        changed = TrainingStep(child, size=(160, 160), batch=batch, amp=amp)
        if 'ActivationCheckpointHook' in change.lines:
            *others, _ = child.custom_hooks
            assert others == config.custom_hooks
            assert any(map(is_checkpointed, changed.model.modules()))
        after = changed.memory()
        assert after['peak'] < before['peak'], change.lines
