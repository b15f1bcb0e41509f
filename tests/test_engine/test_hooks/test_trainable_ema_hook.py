"""An average of what trains; the trunk is neither copied nor touched."""

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va_mm.engine.hooks import TrainableEMAHook
from e3va_mm.engine.hooks.trainable_ema_hook import _part
from e3va_mm.weights import read_adapter
from tests.helpers import build_e3va
from tests.test_engine.test_hooks.interrupted import (
    differing,
    run,
    weights,
)
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
randomness = dict(seed=0)
train_cfg = dict(max_iters=4, val_interval=4)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
"""


@pytest.fixture
def config(tmp_path):
    make_segmentation(tmp_path)
    return side_path_config(
        tmp_path, segmentation_config(tmp_path), HEAD, MORE
    )[0]


def with_average(config, work, kind='e3va_mm.TrainableEMAHook', **options):
    hooks = options.pop('more', [])
    hook = dict(type=kind, momentum=0.3, **options.pop('hook', {}))
    return run(config, work, custom_hooks=[hook, *hooks], **options)


def hook_of(runner):
    (hook,) = (h for h in runner.hooks if isinstance(h, EMAHook))
    return hook


def saved(work, name='iter_4.pth'):
    return torch.load(work / name, weights_only=False)


@pytest.mark.parametrize(
    'hook',
    [
        dict(begin_iter=2),
        dict(update_buffers=True, interval=2),
        dict(ema_type='mmdet.ExpMomentumEMA', update_buffers=True),
        dict(ema_type='StochasticWeightAverage'),
    ],
)
def test_the_average_is_that_of_mmengine(config, tmp_path, hook):
    if 'ema_type' in hook and 'Stochastic' in hook['ema_type']:
        hook = {**hook, 'momentum': None}
    runs = {}
    for kind in ('EMAHook', 'e3va_mm.TrainableEMAHook'):
        options = {'type': kind, 'momentum': 0.3, **hook}
        if options['momentum'] is None:
            del options['momentum']
        work = tmp_path / kind
        runs[kind] = run(config, work, custom_hooks=[options]), saved(work)
    (_, stock), (runner, ours) = runs.values()
    # What the file gives to tests: the average, as a whole model.
    assert not differing(stock['state_dict'], ours['state_dict'])
    metrics = [
        r.message_hub.get_scalar('val/mIoU').current()
        for r, _ in runs.values()
    ]
    assert metrics[0] == metrics[1]
    assert not differing(*(weights(r) for r, _ in runs.values()))
    average = ours['ema_state_dict']
    assert average.keys() < stock['ema_state_dict'].keys()
    for key, value in average.items():
        assert torch.equal(value, stock['ema_state_dict'][key]), key


def test_the_trunk_is_in_no_copy(config, tmp_path):
    runner = with_average(
        config, tmp_path / 'run', hook=dict(update_buffers=True)
    )
    average = hook_of(runner).ema_model
    trained = {
        name for name, p in runner.model.named_parameters() if p.requires_grad
    }
    assert {n for n, _ in average.module.named_parameters()} == trained
    trunk = runner.model.backbone.trunk_state()
    found = {
        name.removeprefix('backbone.')
        for name, _ in average.module.named_buffers()
    }
    assert found and not found & trunk.keys()
    size = (tmp_path / 'run' / 'iter_4.pth').stat().st_size
    with_average(config, tmp_path / 'stock', 'EMAHook')
    stock = (tmp_path / 'stock' / 'iter_4.pth').stat().st_size
    taken = sum(value.nbytes for value in trunk.values())
    assert size < stock - 0.9 * taken


@pytest.mark.parametrize('kind', ['bf16', 'int8'])
def test_a_trunk_that_is_stored_coarser(config, tmp_path, kind):
    if kind == 'int8':
        pytest.importorskip('torchao')
    option = {'model.backbone.side_path.trunk_weights': kind}
    hook = dict(update_buffers=True)
    runner = with_average(config, tmp_path / 'run', hook=hook, **option)
    stored = runner.model.backbone.stages[0].blocks[0].ffn.layers[1].weight
    assert (stored.dtype == torch.bfloat16) == (kind == 'bf16')
    assert is_traceable_wrapper_subclass(stored) == (kind == 'int8')
    plain = run(config, tmp_path / 'plain', **{'train_cfg.max_iters': 1})
    expected = plain.model.backbone.trunk_state()
    for state in (
        runner.model.backbone.trunk_state(),
        runner.model.backbone.trunk_part(
            {
                key.removeprefix('backbone.'): value
                for key, value in saved(tmp_path / 'run')['state_dict'].items()
                if key.startswith('backbone.')
            }
        ),
    ):
        assert not differing(expected, dict(state))


def test_validation_sees_the_average_and_training_does_not(
    config, tmp_path, monkeypatch
):
    key = 'decode_head.conv_seg.weight'
    seen = []
    before, after = (
        TrainableEMAHook.before_val_epoch,
        TrainableEMAHook.after_val_epoch,
    )

    def look(function):
        def looking(self, runner, *args, **kwargs):
            seen.append(weights(runner)[key])
            function(self, runner, *args, **kwargs)
            seen.append(weights(runner)[key])

        return looking

    monkeypatch.setattr(TrainableEMAHook, 'before_val_epoch', look(before))
    monkeypatch.setattr(TrainableEMAHook, 'after_val_epoch', look(after))
    with_average(config, tmp_path / 'run')
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], saved(tmp_path / 'run')['state_dict'][key])


def test_adapter_files_have_the_average(config, tmp_path):
    adapters = dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False)
    with_average(config, tmp_path / 'run', more=[adapters])
    found = read_adapter(tmp_path / 'run' / 'adapter_iter_4.safetensors')
    state = saved(tmp_path / 'run')['state_dict']
    for key, value in found.tensors.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize('first', ['EMAHook', 'e3va_mm.TrainableEMAHook'])
def test_the_average_goes_on(config, tmp_path, first):
    """Also from a checkpoint of mmengine's own hook."""
    work = tmp_path / 'run'
    with_average(config, work, first, stop=2)
    before = saved(work, 'iter_2.pth')
    seen = {}

    class Look(TrainableEMAHook):
        def before_train(self, runner):
            super().before_train(runner)
            seen.update(self.ema_model.state_dict())
            seen.update({f'now.{k}': v for k, v in weights(runner).items()})
            seen.update({k: v.clone() for k, v in seen.items()})

    run(
        config,
        work,
        resume=True,
        custom_hooks=[dict(type=Look, momentum=0.3)],
    )
    assert seen['steps'] == 2
    # mmengine keeps the average in the place of the weights.
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(seen[f'module.{key}'], before['state_dict'][key])
    assert torch.equal(
        seen[f'now.{key}'], before['ema_state_dict'][f'module.{key}']
    )
    assert saved(work)['ema_state_dict']['steps'] == 4


def test_a_resume_without_an_average_begins_one(config, tmp_path, capfd):
    work = tmp_path / 'run'
    run(config, work, stop=2)
    with_average(config, work, resume=True)
    assert 'it starts from the weights' in ''.join(capfd.readouterr())
    assert saved(work)['ema_state_dict']['steps'] == 2


def test_tests_take_what_is_loaded(config, tmp_path):
    """Whatever a file leaves out: here, all that is averaged."""
    work = tmp_path / 'run'
    with_average(config, work)
    for name in ('iter_4.pth', None):
        option = dict(load_from=name and str(work / name))
        runner = with_average(
            config, tmp_path / 'test', **option, **{'train_cfg.max_iters': 0}
        )
        before = weights(runner)
        hook_of(runner)._swap_ema_parameters()
        assert not differing(before, weights(runner))


def test_tensors_that_a_model_shares():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_e3va()
            self.first = nn.Linear(2, 2)
            self.second = nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.register_buffer('count', torch.zeros(1))
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    model = Model()
    part = _part(model, True)
    assert part.first.weight is part.second.weight is model.first.weight
    assert 'frozen' not in part.state_dict()
