"""What cannot be resumed is refused before any state is loaded."""

import types

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import nn

from e3va_mm.commands import launch
from e3va_mm.engine.hooks.resume_check_hook import (
    OPTIMIZED,
    TRAINABLE,
    optimized_names,
)
from e3va_mm.errors import CheckpointError
from tests.helpers import TINY
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

HEAD = (
    'decode_head=dict(in_channels=256, in_index=3, '
    "norm_cfg=dict(type='BN')), auxiliary_head=None"
)
MORE = """
train_cfg = dict(max_iters=2)
val_cfg = None
val_dataloader = None
val_evaluator = None
param_scheduler = [dict(type='ConstantLR', factor=0.5, by_epoch=False, end=9)]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
custom_hooks = [dict(type='e3va_mm.ResumeCheckHook')]
"""


@pytest.fixture
def config(tmp_path):
    make_segmentation(tmp_path)
    return side_path_config(
        tmp_path, segmentation_config(tmp_path), HEAD, MORE
    )[0]


@HOOKS.register_module()
class LoadedHook(Hook):
    """Sees whether the optimizer's state has come."""

    def before_train(self, runner):
        runner.loaded = len(runner.optim_wrapper.optimizer.state)


def refusal(config, work_dir, **options):
    with pytest.raises(CheckpointError) as error:
        run(config, work_dir, resume=True, **options)
    return str(error.value)


def test_the_same_set_goes_on(config, tmp_path):
    work = tmp_path / 'run'
    run(config, work, stop=1)
    names = torch.load(work / 'iter_1.pth', weights_only=False)['meta'][
        OPTIMIZED
    ]
    assert 'decode_head.conv_seg.weight' in names
    assert not any(name.startswith('backbone.stages') for name in names)
    assert run(config, work, resume=True).iter == 2


def test_another_set_is_refused(config, tmp_path, monkeypatch):
    work = tmp_path / 'run'
    runner = run(config, work, stop=1)
    monkeypatch.setattr(
        type(runner.optim_wrapper),
        'load_state_dict',
        lambda *args: pytest.fail('state was loaded before the check'),
    )
    option = {'model.backbone.side_path.train_output_norms': False}
    text = refusal(config, work, **option)
    assert '0' not in option
    assert (
        'none train now and did not, backbone.norm0.weight, '
        'backbone.norm0.bias, backbone.norm1.weight, backbone.norm1.bias, '
        'backbone.norm2.weight and 3 more trained and do not now'
    ) in text
    assert 'Resume with the config of that run' in text
    assert '`resume=False`, `load_from=' in text
    count = len([p for p in runner.model.parameters() if p.requires_grad])
    assert f'{count} trainable parameters, this one has {count - 8}' in text

    other = tmp_path / 'other'
    run(config, other, stop=1, **option)
    assert 'norm2.weight and 3 more train now and did not, none trai' in (
        refusal(config, other)
    )


def test_another_order_is_refused(config, tmp_path):
    run(config, tmp_path / 'run', stop=1)
    path = tmp_path / 'run' / 'iter_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta'][OPTIMIZED].reverse()
    torch.save(checkpoint, path)
    text = refusal(config, tmp_path / 'run')
    assert 'the same parameters, but in another order' in text


def test_older_checkpoints_name_what_required_a_gradient(config, tmp_path):
    runner = run(config, tmp_path / 'run', stop=1)
    path = tmp_path / 'run' / 'iter_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['meta'][OPTIMIZED]
    checkpoint['meta'][TRAINABLE] = [
        n for n, p in runner.model.named_parameters() if p.requires_grad
    ]
    torch.save(checkpoint, path)
    assert run(config, tmp_path / 'run', resume=True).iter == 2

    gone = checkpoint['meta'][TRAINABLE].pop()
    torch.save(checkpoint, path)
    text = refusal(config, tmp_path / 'run', load_from=str(path))
    assert f'{gone} train now and did not' in text


def test_a_backbone_that_freezes_in_train_goes_on(tmp_path):
    """A stock Swin: all of it requires a gradient until then."""
    make_segmentation(tmp_path)
    base = segmentation_config(tmp_path)
    config = tmp_path / 'swin.py'
    config.write_text(f"""
_base_ = {base!r}
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', frozen_stages=2, **{TINY}),
    decode_head=dict(in_channels=256, norm_cfg=dict(type='BN')))
{MORE}
train_cfg.update(max_iters=5)
custom_hooks += [dict(type='e3va_mm.TrainingGuardHook')]
model['backbone']['out_indices'] = (3, )
model['decode_head']['in_index'] = 0
""")
    work = tmp_path / 'run'
    runner = run(config, work, stop=2)
    assert not runner.model.backbone.stages[0].blocks[0].norm1.weight.grad
    assert run(config, work, resume=True).iter == 5
    logs = ''.join(log.read_text() for log in work.glob('*/*.log'))
    assert 'frozen tensors are what they were' in logs
    assert 'no gradient has come' not in logs


def test_names_are_those_of_the_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    runner = types.SimpleNamespace(model=model)

    def wrapper(*layers):
        groups = [dict(params=[*layer.parameters()]) for layer in layers]
        return OptimWrapper(torch.optim.SGD(groups, lr=0.1))

    model[1].requires_grad_(False)
    # In the order of its groups, which its state has.
    runner.optim_wrapper = wrapper(model[1], model[0])
    names = ['1.weight', '1.bias', '0.weight', '0.bias']
    assert optimized_names(runner) == names
    runner.optim_wrapper.param_groups[0]['params'].pop()
    assert optimized_names(runner) == [names[0], *names[2:]]
    two = OptimWrapperDict(a=wrapper(model[1]), b=wrapper(model[0]))
    runner.optim_wrapper = two
    assert optimized_names(runner) == names
    # Flat parameters of another library, another optimizer.
    for other in (wrapper(nn.Linear(2, 2)), types.SimpleNamespace(), None):
        runner.optim_wrapper = other
        assert optimized_names(runner) == names[2:]


def test_an_adapter_file_is_refused(config, tmp_path):
    hook = dict(
        type='e3va_mm.AdapterCheckpointHook', by_epoch=False, interval=1
    )
    check = dict(type='e3va_mm.ResumeCheckHook')
    run(config, tmp_path / 'run', custom_hooks=[hook, check])
    path = tmp_path / 'run' / 'adapter_iter_2.safetensors'
    text = refusal(config, tmp_path / 'other', load_from=str(path))
    assert f'{path} is an adapter file, which does not hold the state' in text
    assert 'Resume from a full checkpoint' in text
    assert f'`resume=False`, `load_from={str(path)!r}`' in text


def test_an_adapter_file_is_refused_without_the_hook_too(config, tmp_path):
    hook = dict(
        type='e3va_mm.AdapterCheckpointHook', by_epoch=False, interval=1
    )
    run(config, tmp_path / 'run', custom_hooks=[hook])
    path = tmp_path / 'run' / 'adapter_iter_2.safetensors'
    options = dict(load_from=str(path), custom_hooks=[])
    text = refusal(config, tmp_path / 'other', **options)
    assert f'{path} is an adapter file, which does not hold the state' in text
    assert f'`resume=False`, `load_from={str(path)!r}`' in text


@pytest.mark.parametrize(
    'key, what',
    [
        ('message_hub', 'no state of the run (`message_hub`)'),
        ('optimizer', 'no state of the optimizer (`optimizer`)'),
        ('param_schedulers', 'no state of schedules (`param_schedulers`)'),
        ('meta', 'no epoch and iteration (`meta`)'),
    ],
)
def test_a_part_that_is_not_there(config, tmp_path, key, what):
    run(config, tmp_path / 'run', stop=1)
    path = tmp_path / 'run' / 'iter_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[key]
    torch.save(checkpoint, path)
    text = refusal(config, tmp_path / 'run')
    assert f'the latest checkpoint holds {what}' in text
    assert '`save_optimizer=True`' in text


def test_weights_alone_are_refused(config, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(run(config, tmp_path / 'run').model.state_dict(), path)
    text = refusal(config, tmp_path / 'run', load_from=str(path))
    assert 'no epoch and iteration (`meta`), no state of the run' in text


def test_to_load_weights_is_another_thing(config, tmp_path):
    run(config, tmp_path / 'run', stop=1)
    path = tmp_path / 'run' / 'iter_1.pth'
    runner = run(
        config,
        tmp_path / 'other',
        load_from=str(path),
        **{'model.backbone.side_path.train_output_norms': False},
    )
    assert runner.iter == 2


def test_the_tool_has_the_hook_by_itself(config, tmp_path, capsys):
    text = config.read_text()
    text = text[: text.index('custom_hooks')]
    config.write_text(text)
    assert launch.train([str(config)]) == 0
    config.write_text(
        text + "model['backbone']['side_path'] = dict("
        'train_output_norms=False)\n'
    )
    assert launch.train([str(config), '--resume']) == 1
    assert 'error: ' in (error := capsys.readouterr().err)
    assert 'trained and do not now' in error
