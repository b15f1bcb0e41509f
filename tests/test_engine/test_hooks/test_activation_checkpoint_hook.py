"""The hook under stock runners, with wrappers and compiled."""

import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from e3va_mm.engine.checkpointing import is_checkpointed
from e3va_mm.engine.hooks import ActivationCheckpointHook
from e3va_mm.errors import ConfigError
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)
from tests.test_tools.test_stock_tools import stock_train

NO_VALIDATION = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)


class Logger:
    def __init__(self):
        self.lines = []

    def info(self, text):
        self.lines.append(text)

    def log(self, level, text):
        self.lines.append(text)


def hook_and_runner(model, modules):
    runner = types.SimpleNamespace(model=model, logger=Logger())
    return ActivationCheckpointHook(modules), runner


def config(folder, modules, **options):
    make_coco(folder, 'train')
    hooks = [dict(type='e3va_mm.ActivationCheckpointHook', modules=modules)]
    return detection_config(
        folder, custom_hooks=hooks, **NO_VALIDATION, **options
    )


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
    assert runner.logger.lines == ['Activation checkpointing: neck']


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


def trained(path):
    """Weights after one epoch of the stock runner."""
    runner = Runner.from_cfg(Config.fromfile(path))
    runner.train()
    return runner.model.state_dict()


def test_stock_runner_learns_the_same(tmp_path):
    options = dict(randomness=dict(seed=0))
    modules = ['neck', 'rpn_head', 'roi_head.bbox_head.*']
    expected = trained(config(tmp_path / 'plain', [], **options))
    state = trained(config(tmp_path / 'ours', modules, **options))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    (log,) = tmp_path.glob('ours/work/*/*.log')
    log = log.read_text()
    assert (
        'Activation checkpointing: neck, rpn_head, roi_head.bbox_head.0, '
        'roi_head.bbox_head.1, roi_head.bbox_head.2'
    ) in log
    assert 'no effect' not in log


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


def test_runner_of_strategies(tmp_path):
    path = config(tmp_path, ['roi_head', 'neck'])
    runner = FlexibleRunner.from_cfg(Config.fromfile(path))
    runner.train()
    assert runner.model.neck.checkpoint_has_run
    (log,) = tmp_path.glob('work/*/*.log')
    assert 'no effect on roi_head: ' in log.read_text()


def test_a_wrong_path_ends_the_run_before_the_first_step(tmp_path):
    runner = Runner.from_cfg(
        Config.fromfile(config(tmp_path, ['nekc', 'rpn_head']))
    )
    with pytest.raises(ConfigError, match="'nekc'. Nearest are: .*neck"):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
def test_frameworks_own_train(framework, tmp_path):
    if framework == 'mmdet':
        path = config(tmp_path, ['neck', 'roi_head.bbox_head.*'])
    else:
        make_segmentation(tmp_path)
        hook = dict(
            type='e3va_mm.ActivationCheckpointHook', modules=['decode_head']
        )
        path = segmentation_config(tmp_path, custom_hooks=[hook])
    done = stock_train(framework, Path(path))
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert 'Activation checkpointing: ' in log
    assert 'no effect' not in log
