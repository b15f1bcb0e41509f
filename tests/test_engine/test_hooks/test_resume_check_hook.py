"""What cannot be resumed is refused before any state is loaded."""

import types

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from e3va_mm.engine.hooks.resume_check_hook import OPTIMIZED, optimized_names
from e3va_mm.errors import CheckpointError
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.toy import ToyModel, toy_config

CHECK = dict(type='e3va_mm.ResumeCheckHook')
FROZEN = [dict(type='e3va_mm.FreezeHook', freeze=['norm']), CHECK]


@pytest.fixture
def config():
    return toy_config(custom_hooks=[CHECK])


def refusal(config, work_dir, **options):
    with pytest.raises(CheckpointError) as error:
        run(config, work_dir, resume=True, **options)
    return str(error.value)


def changed(path, change):
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_the_same_set_goes_on(config, tmp_path):
    run(config, tmp_path, stop=1)
    path = tmp_path / 'iter_1.pth'
    names = torch.load(path, weights_only=False)['meta'][OPTIMIZED]
    assert 'head.weight' in names
    assert run(config, tmp_path, resume=True).iter == 7
    # Those of before the hook name nothing.
    changed(path, lambda checkpoint: checkpoint['meta'].pop(OPTIMIZED))
    again = run(config, tmp_path, resume=True, load_from=str(path))
    assert again.iter == 7


def test_another_set_is_refused(config, tmp_path, monkeypatch):
    run(config, tmp_path / 'a', stop=1)
    frozen = dict(custom_hooks=FROZEN)
    run(config, tmp_path / 'b', stop=1, **frozen)
    monkeypatch.setattr(
        OptimWrapper,
        'load_state_dict',
        lambda *args: pytest.fail('state was loaded before the check'),
    )
    text = refusal(config, tmp_path / 'a', **frozen)
    assert (
        'none train now and did not, norm.weight, norm.bias trained and do '
        'not now'
    ) in text
    assert '4 trainable parameters, this one has 2' in text
    assert 'Resume with the config of that run' in text
    assert '`resume=False`, `load_from=' in text
    text = refusal(config, tmp_path / 'b')
    assert 'norm.weight, norm.bias train now and did not, none trai' in text
    # To load weights is another thing.
    path = str(tmp_path / 'a' / 'iter_1.pth')
    monkeypatch.undo()
    assert run(config, tmp_path / 'c', load_from=path, **frozen).iter == 7


def test_another_order_is_refused(config, tmp_path):
    run(config, tmp_path, stop=1)
    changed(
        tmp_path / 'iter_1.pth',
        lambda checkpoint: checkpoint['meta'][OPTIMIZED].reverse(),
    )
    text = refusal(config, tmp_path)
    assert 'the same parameters, but in another order' in text


def test_a_model_that_freezes_in_train_goes_on(config, tmp_path, monkeypatch):
    """As a stock Swin with `frozen_stages`."""

    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.norm.requires_grad_(False)
        return self

    monkeypatch.setattr(ToyModel, 'train', train)
    run(config, tmp_path, stop=2)
    assert run(config, tmp_path, resume=True).iter == 7


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
    two = OptimWrapperDict(a=wrapper(model[1]), b=wrapper(model[0]))
    runner.optim_wrapper = two
    assert optimized_names(runner) == names


def test_an_adapter_file_is_refused(config, tmp_path):
    hook = dict(
        type='e3va_mm.AdapterCheckpointHook', by_epoch=False, interval=1
    )
    run(config, tmp_path / 'run', custom_hooks=[hook])
    path = tmp_path / 'run' / 'adapter_iter_7.safetensors'
    for hooks in ([], [CHECK]):
        options = dict(load_from=str(path), custom_hooks=hooks)
        text = refusal(config, tmp_path / 'other', **options)
        assert f'`load_from={str(path)!r}`' in text


@pytest.mark.parametrize(
    'key, what',
    [
        ('message_hub', 'message_hub'),
        ('optimizer', 'optimizer'),
        ('param_schedulers', 'param_schedulers'),
        ('meta', 'epoch and iteration'),
    ],
)
def test_a_part_that_is_not_there(config, tmp_path, key, what):
    run(config, tmp_path, stop=1)
    changed(tmp_path / 'iter_1.pth', lambda checkpoint: checkpoint.pop(key))
    text = refusal(config, tmp_path)
    assert f'the latest checkpoint holds no {what}. Resume from an' in text
    assert '`save_optimizer=True`' in text


def test_weights_alone_are_refused(config, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(run(config, tmp_path / 'run').model.state_dict(), path)
    text = refusal(config, tmp_path / 'run', load_from=str(path))
    assert 'no epoch and iteration, no message_hub, no optimizer' in text


def test_options_without_effect_are_named(config, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        'e3va_mm.engine.hooks.resume_check_hook.print_log',
        lambda text, *args, **kwargs: lines.append(text),
    )
    run(config, tmp_path, stop=1)
    optimizer = dict(config['optim_wrapper']['optimizer'], lr=0.5)
    wrapper = dict(config['optim_wrapper'], optimizer=optimizer)
    run(config, tmp_path, resume=True, optim_wrapper=wrapper)
    (line,) = lines
    assert line.startswith('warning: a resume goes on with the optimizer')
    assert 'optim_wrapper.optimizer.lr=0.5 (' in line
    run(config, tmp_path, resume=True)
    assert 'nothing is left to train' in lines[1]
