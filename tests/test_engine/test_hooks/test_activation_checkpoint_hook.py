"""The hook with wrappers and compiled; test_checkpointing has the rest."""

import types

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from e3va_mm.engine.activation_checkpointing import is_checkpointed
from e3va_mm.engine.hooks import ActivationCheckpointHook
from e3va_mm.errors import ConfigError


class Logger:
    def __init__(self):
        self.lines = []

    def info(self, text):
        self.lines.append(text)

    def warning(self, text):
        self.lines.append(text)


def hook_and_runner(model, modules):
    runner = types.SimpleNamespace(model=model, logger=Logger())
    return ActivationCheckpointHook(modules), runner


@pytest.mark.parametrize('wrappers', [0, 1, 2])
def test_modules_inside_wrappers(wrappers):
    model = nn.ModuleDict(dict(neck=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    wrapped = model
    for _ in range(wrappers):
        wrapped = nn.DataParallel(wrapped)
    hook, runner = hook_and_runner(wrapped, ['neck'])
    hook.before_train(runner)
    assert is_checkpointed(model.neck)
    assert not is_checkpointed(model.head)
    assert runner.logger.lines == ["Activation checkpointing: ['neck']"]


def test_modules_whose_forward_is_not_called_are_named_once():
    model = nn.ModuleDict(dict(neck=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    hook, runner = hook_and_runner(model, ['*'])
    hook.before_train(runner)
    model.neck(torch.ones(2))
    for i in range(2):
        hook.after_train_iter(runner, i)
    (line,) = runner.logger.lines[1:]
    assert 'no effect on head: ' in line
    assert "'head.*'" in line


class Regression(BaseModel):
    def __init__(self):
        super().__init__()
        self.neck = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x, mode='loss'):
        return dict(loss=self.head(self.neck(x)).square().mean())


def test_compiled_steps_learn_the_same(tmp_path):
    states = []
    for modules in ([], ['neck']):
        torch.manual_seed(0)
        runner = Runner(
            model=Regression(),
            work_dir=str(tmp_path),
            experiment_name=f'compiled_{len(modules)}',
            train_dataloader=DataLoader(
                TensorDataset(torch.randn(8, 2)), batch_size=4
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            custom_hooks=[ActivationCheckpointHook(modules)],
            cfg=dict(compile=dict(backend='eager')),
        )
        runner.train()
        states.append(runner.model.state_dict())
    assert runner.model.neck.checkpoint_has_run
    plain, ours = states
    assert plain['neck.1.num_batches_tracked'] == 2
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name


def test_a_wrong_path_ends_the_run_before_the_first_step():
    hook, runner = hook_and_runner(Regression(), ['nekc'])
    with pytest.raises(ConfigError, match="'nekc'. Nearest are: neck"):
        hook.before_train(runner)
