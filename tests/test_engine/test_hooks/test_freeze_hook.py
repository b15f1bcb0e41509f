"""What is frozen stays as it was, and the rest of the run goes on."""

import time
import weakref
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from e3va_mm.engine.hooks import FreezeHook
from e3va_mm.errors import ConfigError
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

ROOT = Path(__file__).parents[3]


class Head(nn.Module):
    """Computes a loss, and asks for its mode to know which."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.cls = nn.Linear(4, 2)
        self.seen = []

    def loss(self, x):
        self.seen.append(self.training)
        return self.cls(self.layers(x)).square().mean()


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 4)
        self.neck = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.heads = nn.ModuleList([Head(), Head()])
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, mode='loss'):
        x = self.neck(self.backbone(x)) * self.scale
        return {f'loss_{i}': h.loss(x) for i, h in enumerate(self.heads)}


def data(count=8):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 2, generator=generator)
    return DataLoader(TensorDataset(values), batch_size=4)


def runner_of(folder, hooks, model=None, **options):
    if isinstance(hooks, dict):
        hooks = [dict(type='e3va_mm.FreezeHook', **hooks)]
    settings = dict(
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
        param_scheduler=dict(type='LinearLR', end=3, by_epoch=False),
    )
    return Runner(
        model=model or Toy(),
        work_dir=str(folder),
        experiment_name=f'freeze{time.monotonic_ns()}',
        train_dataloader=data(),
        custom_hooks=hooks,
        **{**settings, **options},
    )


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before, model):
    now = model.state_dict()
    return {k for k, v in before.items() if not torch.equal(v, now[k])}


def log_of(folder):
    (log,) = folder.glob('**/*.log')
    return log.read_text()


EVERY = {*Toy().state_dict()}
HEADS = {name for name in EVERY if name.startswith('heads.')}
CLS = {name for name in EVERY if '.cls.' in name}
NECK = {name for name in EVERY if name.startswith('neck.')}


@pytest.mark.parametrize(
    'options, frozen',
    [
        (dict(freeze=['neck']), NECK),
        (dict(freeze=['heads']), HEADS),
        (dict(freeze=['heads.*']), HEADS),
        (dict(freeze=['heads.*.cls']), CLS),
        (dict(freeze=['heads'], train=['heads.*.cls']), HEADS - CLS),
        (dict(freeze=['*'], train=['heads.0.cls.bias']), None),
        (dict(freeze=['scale', 'heads.0']), None),
        (dict(freeze=['neck', 'neck.0', 'neck']), NECK),
    ],
)
def test_exactly_what_is_chosen_stays(tmp_path, options, frozen):
    if frozen is None and options['freeze'] == ['*']:
        frozen = EVERY - {'heads.0.cls.bias'}
    elif frozen is None:
        frozen = {n for n in HEADS if n.startswith('heads.0')} | {'scale'}
    runner = runner_of(tmp_path, options)
    before = copied(runner.model)
    runner.train()
    # Dropout may leave a bias alone for a step, weight decay nothing.
    assert changed(before, runner.model) == EVERY - frozen
    stepped = {
        id(p)
        for group in runner.optim_wrapper.optimizer.param_groups
        for p in group['params']
    }
    for name, parameter in runner.model.named_parameters():
        assert parameter.requires_grad == (name not in frozen), name
        assert (id(parameter) in stepped) == (name not in frozen), name
        assert (parameter.grad is None) or name not in frozen


def test_modes_in_a_training_iteration(tmp_path):
    seen = []

    class Look(Hook):
        priority = 'VERY_LOW'

        def before_train_iter(self, runner, *args, **kwargs):
            model = runner.model
            quiet = {n for n, m in model.named_modules() if not m.training}
            seen.append(quiet)

    freeze = FreezeHook(['neck', 'heads'], train=['heads.0.layers.1'])
    runner = runner_of(tmp_path, [freeze, Look()])
    runner.train()
    assert (
        seen
        == [
            {
                *('neck', 'neck.0', 'neck.1', 'heads'),
                *('heads.0.layers', 'heads.0.layers.0', 'heads.0.cls'),
                *('heads.1.layers', 'heads.1.layers.0', 'heads.1.layers.1'),
                'heads.1.cls',
            }
        ]
        * 4
    )
    # Heads ask for the model's mode; theirs is not changed.
    assert all(all(head.seen) for head in runner.model.heads)


def test_what_was_found_is_listed(tmp_path):
    model = Toy()
    model.heads[0].cls.bias.requires_grad_(False)
    options = dict(freeze=['neck', 'heads.*', 'scale'], train=['heads.1.cls'])
    runner_of(tmp_path, options, model).train()
    lines = [line.strip() for line in log_of(tmp_path).splitlines()]
    start = next(i for i, line in enumerate(lines) if 'FreezeHook:' in line)
    assert lines[start + 1 : start + 6] == [
        'frozen: neck, 8 parameters',
        'frozen: heads.0, 30 parameters',
        'frozen: heads.1, 20 parameters',
        'frozen: scale, 1 parameters',
        'trains: heads.1.cls, 10 parameters',
    ]


@pytest.mark.parametrize('paramwise', [True, False])
def test_groups_and_schedulers_stay(tmp_path, paramwise):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
    if paramwise:
        wrapper['paramwise_cfg'] = dict(custom_keys=dict(neck=dict(lr_mult=2)))
    runners = [
        runner_of(tmp_path / str(i), hooks, optim_wrapper=wrapper)
        for i, hooks in enumerate([[], dict(freeze=['neck', 'heads.0'])])
    ]
    rates = []
    for runner in runners:
        runner.train()
        groups = runner.optim_wrapper.optimizer.param_groups
        rates.append([group['lr'] for group in groups])
    assert rates[0] == rates[1]
    count = len(list(Toy().parameters()))
    assert len(rates[0]) == (count if paramwise else 1)
    # What is left has a state, and nothing else.
    assert len(runners[1].optim_wrapper.optimizer.state) == count - 6


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    options = dict(freeze=['neck', 'heads.0'])
    whole = runner_of(tmp_path / 'whole', options)
    start = copied(whole.model)
    torch.manual_seed(1)
    whole.train()
    after = torch.load(tmp_path / 'whole' / 'epoch_1.pth', weights_only=False)[
        'state_dict'
    ]
    second = runner_of(
        tmp_path / 'second',
        options,
        load_from=str(tmp_path / 'whole' / 'epoch_1.pth'),
        resume=True,
    )
    before = {}

    class Look(Hook):
        def before_train(self, runner):
            before.update(copied(runner.model))

    second.register_hook(Look())
    second.train()
    assert second.epoch == 2
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert changed(start, second.model) == EVERY - {
        n for n in EVERY if n.startswith(('neck', 'heads.0'))
    }
    first, again = (
        r.optim_wrapper.optimizer.state_dict()['state']
        for r in (whole, second)
    )
    assert first.keys() == again.keys()
    assert all(state['step'] == 4 for state in again.values())


def test_several_optimizers(tmp_path):
    hook = FreezeHook(['neck', 'scale'])
    runner = runner_of(tmp_path, [hook])
    runner.train()
    model = runner.model = Toy()
    wrapper = runner.optim_wrapper = OptimWrapperDict(
        **{
            name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=0.1))
            for name, part in model.named_children()
            if name != 'data_preprocessor'
        }
    )
    hook.before_run(runner)
    counts = {
        name: sum(len(g['params']) for g in each.optimizer.param_groups)
        for name, each in wrapper.items()
    }
    assert counts == dict(backbone=2, neck=0, heads=8)
    wrapper['neck'].optimizer.step()


# ---- what is refused


@pytest.mark.parametrize(
    'options, text',
    [
        (dict(freeze=['nekc']), "No module or parameter of Toy fits .*'nekc'"),
        (dict(freeze=['nekc']), 'Nearest are: .*neck'),
        (dict(freeze=['neck', 'head.*']), "'head.*'. Nearest are: .*heads"),
        (dict(freeze=['neck.']), r"'neck\.'"),
        (dict(freeze=['neck'], train=['haeds']), "'haeds'. .*heads"),
        (
            dict(freeze=['neck'], train=['heads.0']),
            "`train` names 'heads.0', ",
        ),
        (dict(freeze=['*']), r"freeze=\['\*'\] .* nothing to train in Toy"),
        (dict(freeze=['heads.0'], train=['heads']), "names 'heads', which no"),
    ],
)
def test_paths_that_cannot_work(tmp_path, options, text):
    runner = runner_of(tmp_path, options)
    with pytest.raises(ConfigError, match=text):
        runner.train()
    assert runner.iter == 0
    assert all(p.requires_grad for p in runner.model.parameters())


@pytest.mark.parametrize('option', ['freeze', 'train'])
def test_a_string_is_no_list(option):
    options = dict(freeze=['neck'])
    options[option] = 'neck'
    with pytest.raises(ConfigError, match=f'FreezeHook: `{option}` should be'):
        FreezeHook(**options)


def side_path_segmentor(folder, hook):
    make_segmentation(folder)
    config, _, trunk = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, in_index=3, '
        "norm_cfg=dict(type='BN')), auxiliary_head=None",
        f"custom_hooks = [dict(type='e3va_mm.FreezeHook', {hook})]",
    )
    return Runner.from_cfg(Config.fromfile(config)), trunk


@pytest.mark.parametrize(
    'path, part',
    [
        ('*', 'backbone.side_path'),
        ('backbone.side_path.stages.0', 'backbone.side_path'),
        ('backbone.norm3.weight', 'backbone.norm3'),
    ],
)
def test_a_side_path_is_not_frozen(tmp_path, path, part):
    runner, _ = side_path_segmentor(tmp_path, f"freeze=['{path}']")
    with pytest.raises(ConfigError) as error:
        runner.train()
    text = str(error.value)
    assert f"FreezeHook would freeze '{part}', which is what trains" in text
    assert f"train=['{part}']" in text


@pytest.mark.parametrize(
    'hook',
    [
        "freeze=['*'], train=['backbone']",
        "freeze=['decode_head', 'backbone.stages.*']",
    ],
)
def test_a_side_path_learns_below_a_frozen_head(tmp_path, hook):
    runner, trunk = side_path_segmentor(tmp_path, hook)
    before = {}

    class Look(Hook):
        def before_train(self, runner):
            before.update(copied(runner.model))

    runner.register_hook(Look())
    runner.train()
    moved = changed(before, runner.model)
    assert any(name.startswith('backbone.side_path') for name in moved)
    assert all(name.startswith('backbone.') for name in moved)
    assert moved.isdisjoint(f'backbone.{n}' for n in trunk if 'norm3' not in n)


def test_wrappers_that_cannot_be_taken_off_are_refused(tmp_path):
    runner = runner_of(tmp_path, dict(freeze=['neck']))
    runner.model = nn.DataParallel(runner.model)
    with pytest.raises(ConfigError, match='but got DataParallel. Set `model_'):
        runner.train()


def test_a_run_that_tests_is_left_alone(tmp_path):
    runner = runner_of(tmp_path, dict(freeze=['nothing.such']))
    runner.call_hook('before_run')
    assert all(p.requires_grad for p in runner.model.parameters())


def wrapped(folder, hook):
    runner = runner_of(
        folder,
        [hook],
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel', device_ids=None
            )
        ),
    )
    runner._distributed = True
    runner.model = runner.wrap_model(
        runner.cfg.model_wrapper_cfg, runner.model
    )
    return runner


def test_the_old_wrapper_is_gone(tmp_path, one_process):
    runner = wrapped(tmp_path, FreezeHook(['neck', 'heads.0']))
    old, inner = weakref.ref(runner.model), runner.model.module
    before = copied(inner)
    runner.train()
    assert old() is None
    assert type(runner.model) is MMDistributedDataParallel
    assert runner.model.module is inner
    frozen = {n for n in EVERY if n.startswith(('neck', 'heads.0'))}
    assert changed(before, inner) == EVERY - frozen
    # Once more, as for another stage of training: there is nothing to do.
    now = runner.model
    runner.call_hook('before_run')
    assert runner.model is now


def test_an_optimizer_dealt_out_to_processes(tmp_path, one_process):
    """Its groups stay; what has no gradient it leaves alone."""
    runner = runner_of(
        tmp_path,
        [FreezeHook(['neck', 'heads.0'])],
        optim_wrapper=dict(
            optimizer=dict(
                type='ZeroRedundancyOptimizer',
                optimizer_type='AdamW',
                lr=0.1,
                weight_decay=0.1,
            )
        ),
        default_hooks=dict(checkpoint=None),
    )
    before = copied(runner.model)
    runner.train()
    frozen = {n for n in EVERY if n.startswith(('neck', 'heads.0'))}
    assert changed(before, runner.model) == EVERY - frozen
