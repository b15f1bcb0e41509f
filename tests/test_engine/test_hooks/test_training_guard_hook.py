"""Runs that cannot come to anything end at once; all others go on."""

import copy
import re
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import (
    BaseModel,
    ExponentialMovingAverage,
    MMDistributedDataParallel,
)
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import BaseDataElement
from torch import nn

from e3va_mm.engine.hooks import TrainingGuardHook, training_guard_hook
from e3va_mm.engine.hooks.training_guard_hook import _Gradients
from e3va_mm.errors import ConfigError, TrainingError
from tests.dist_scripts import launched
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
    side_path_config,
)
from tests.test_tools.test_stock_tools import stock_train

ROOT = Path(__file__).parents[3]
NAN, INF = float('nan'), float('inf')


class Toy(BaseModel):
    """A frozen trunk, a norm over it, and a head; ``spare`` is not used."""

    def __init__(self, spare=False):
        super().__init__()
        self.norm_runs = False
        self.trunk = nn.Sequential(nn.Linear(2, 200), nn.BatchNorm1d(200))
        self.trunk.requires_grad_(False)
        self.norm = nn.BatchNorm1d(200)
        self.head = nn.Linear(200, 1)
        if spare:
            self.spare = nn.ModuleList([nn.Linear(2, 2)])
        self.factors = {}

    def train(self, mode=True):
        super().train(mode)
        self.trunk.train(mode and self.norm_runs)
        return self

    def forward(self, inputs, data_samples=None, mode='tensor'):
        output = self.head(self.norm(self.trunk(torch.stack(inputs))))
        here = {int(s.img_path[0]) for s in data_samples}
        factor = sum(v for k, v in self.factors.items() if k in here) or 1.0
        return {
            'loss_near': output.square().mean(),
            'loss_far': output.abs().mean() * factor,
            'acc': output.new_tensor(NAN),
        }


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        sample = BaseDataElement(metainfo=dict(img_path=f'{index}.jpg'))
        return dict(inputs=torch.randn(2) + index, data_samples=sample)


@HOOKS.register_module()
class DoHook(Hook):
    """Does something to the model after iterations, counted from 1."""

    priority = 'VERY_HIGH'

    def __init__(self, what, at):
        self.what, self.at = what, at

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 in self.at:
            model = getattr(runner.model, 'module', runner.model)
            with torch.no_grad():
                self.what(model)


def runner_of(folder, model=None, guard=None, hooks=(), **options):
    """A stock runner of iterations, two pictures in each, in order."""
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-3))
    optim_wrapper.update(options.pop('optim_wrapper', {}))
    return Runner(
        model=model or Toy(),
        work_dir=str(folder),
        experiment_name=f'guard{time.monotonic_ns()}',
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Pictures(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=options.pop('train_cfg', dict(by_epoch=False, max_iters=5)),
        optim_wrapper=optim_wrapper,
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=False,
                interval=options.pop('save', 1),
                max_keep_ckpts=1,
            )
        ),
        custom_hooks=[
            *hooks,
            dict(type='e3va_mm.TrainingGuardHook', **(guard or {})),
        ],
        **options,
    )


def failing(runner, match=''):
    with pytest.raises(TrainingError, match=match) as error:
        runner.train()
    return str(error.value)


def saved(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


def log_of(folder):
    (log,) = folder.glob('*/*.log')
    return log.read_text()


def test_a_sound_run_ends_with_a_full_look(tmp_path):
    runner_of(tmp_path).train()
    assert saved(tmp_path) == ['iter_5.pth']
    assert 'Training guard: all of the 7 frozen tensors' in log_of(tmp_path)


# ---- loss and weights


@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_a_loss_that_is_not_finite(tmp_path, value):
    model = Toy()
    model.factors = {4: value}
    text = failing(runner_of(tmp_path, model))
    assert text.startswith('Iteration 3: the loss is not finite.\n')
    term = dict(nan='nan', inf='inf').get(str(value), '-inf')
    assert f'loss {term}, loss_near ' in text
    assert f', loss_far {term}, acc nan\n' in text
    assert 'Pictures: 4.jpg, 5.jpg\n' in text
    # An infinite loss gives gradients of sign times infinity, times zero.
    assert 'The update has been made, and the weights are not ' in text
    assert f'The last checkpoint is {tmp_path / "iter_2.pth"}.' in text
    assert 'clip_grad' in text
    assert saved(tmp_path) == ['iter_2.pth']
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert all(v.isfinite().all() for v in state['state_dict'].values())


def test_weights_can_outlive_a_loss(tmp_path):
    model = Toy()
    model.factors = {0: NAN}
    model.head.weight.register_hook(torch.zeros_like)
    for p in [model.head.bias, *model.norm.parameters()]:
        p.register_hook(torch.zeros_like)
    text = failing(runner_of(tmp_path, model))
    assert 'Iteration 1: ' in text
    assert 'The weights are still finite. No checkpoint is written' in text
    assert 'There is no checkpoint to go on from.' in text
    assert saved(tmp_path) == []


def spoil(model):
    model.head.weight[0, 7] = INF


@pytest.mark.parametrize('epochs', [False, True])
def test_broken_weights_replace_no_checkpoint(tmp_path, epochs):
    """The loss was finite; the older file would be removed first."""
    options = {}
    name, last = 'iter_2.pth', 3
    if epochs:
        options = dict(train_cfg=dict(by_epoch=True, max_epochs=3))
        name, last = 'epoch_1.pth', 10
    runner = runner_of(tmp_path, hooks=[DoHook(spoil, [last])], **options)
    if epochs:
        hook = next(h for h in runner.hooks if hasattr(h, 'max_keep_ckpts'))
        hook.by_epoch = True
        hook.filename_tmpl = 'epoch_{}.pth'
    text = failing(runner)
    assert text.startswith(f'Iteration {last}: what trains is not finite.')
    assert 'not finite any more: head.weight.' in text
    assert f'{name}.' in text
    assert saved(tmp_path) == [name]


def test_broken_weights_without_a_checkpoint_show_in_the_next_loss(tmp_path):
    runner = runner_of(tmp_path, hooks=[DoHook(spoil, [2])], save=5)
    assert 'Iteration 3: the loss is not finite' in failing(runner)


def test_whoever_saves_saves_no_broken_weights(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    with torch.no_grad():
        spoil(runner.model)
    text = 'not written, as it is not finite in head.weight. The last check'
    with pytest.raises(TrainingError, match=text):
        runner.save_checkpoint(str(tmp_path), 'other.pth')
    assert saved(tmp_path) == ['iter_5.pth']


def test_pictures_in_all_forms_of_a_batch(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, TrainingGuardHook))

    def sample(**metainfo):
        return BaseDataElement(metainfo=metainfo)

    video = BaseDataElement(metainfo=dict(ori_length=2))
    video.video_data_samples = [sample(img_path='f.jpg')]
    for batch, names in [
        (None, 'the batch names none'),
        (dict(inputs=torch.ones(2), data_samples=None), 'the batch names'),
        (dict(data_samples=[sample(img_id=1)]), 'the batch names none'),
        (dict(data_samples=sample(img_path='a.jpg')), 'a.jpg'),
        (dict(data_samples=[sample(img_path=['a', 'b'])]), 'a, b'),
        (
            dict(
                inputs=dict(sup=[torch.ones(2)], other=[]),
                data_samples=dict(
                    sup=[sample(img_path='s.jpg')],
                    teacher=[sample(img_path='t.jpg')],
                    student=[sample(img_path='t.jpg')],
                ),
            ),
            's.jpg, t.jpg',
        ),
        ([dict(data_samples=[video])], 'f.jpg'),
    ]:
        with pytest.raises(TrainingError) as error:
            hook.after_train_iter(runner, 0, batch, dict(loss=NAN))
        assert f'Pictures: {names}' in str(error.value)


def test_what_a_train_step_without_a_loss_gives(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, TrainingGuardHook))
    runner.train_loop._iter = 10
    hook.after_train_iter(runner, 0, None, dict(a=1, b=torch.ones(3) * NAN))
    hook.after_train_iter(runner, 0, None, None)
    with pytest.raises(TrainingError, match='Loss terms: a 1, b nan'):
        outputs = dict(a=1, b=torch.tensor([NAN]))
        hook.after_train_iter(runner, 0, None, outputs)


# ---- gradients


NONE = 'no gradient has come to '


@pytest.mark.parametrize('counts', [1, 2])
def test_a_parameter_without_gradient(tmp_path, counts):
    """One process trains fine with it."""
    options = dict(optim_wrapper=dict(accumulative_counts=counts))
    options['train_cfg'] = dict(by_epoch=False, max_iters=8)
    runner = runner_of(tmp_path, Toy(spare=True), **options)
    runner.train()
    (before, text) = log_of(tmp_path).split('in 3 steps of the optimizer ')
    assert text.startswith(f'{NONE}spare.0.weight, spare.0.bias, so it does ')
    assert f'checkpoint at {3 * counts - 1} iterations' in before
    assert f'checkpoint at {3 * counts} iterations' not in before
    warning = text[: text.index('\n')]
    assert 'FreezeHook' in warning and 'without_gradient=[' in warning


@pytest.mark.parametrize(
    'paths', [['spare'], ['spare.*'], ['spare.0.bias', '*.0.weight']]
)
def test_parameters_that_may_be_without_gradient(tmp_path, paths):
    guard = dict(without_gradient=paths)
    runner_of(tmp_path, Toy(spare=True), guard).train()
    assert NONE not in log_of(tmp_path)


def test_processes_that_wait_for_gradients(tmp_path, one_process):
    """Torch would end in the second iteration, with numbers for names."""
    runner = runner_of(tmp_path, Toy(spare=True))
    runner.model = MMDistributedDataParallel(runner.model, device_ids=None)
    text = failing(runner)
    assert text.startswith(
        f'Iteration 1: in 1 step of the optimizer {NONE}spare.0.weight, '
        'spare.0.bias. '
    )
    assert 'FreezeHook' in text and 'without_gradient=[' in text
    assert '`find_unused_parameters=True`' in text


def test_processes_that_find_what_has_no_gradient(tmp_path, one_process):
    runner = runner_of(tmp_path, Toy(spare=True))
    runner.model = MMDistributedDataParallel(
        runner.model, device_ids=None, find_unused_parameters=True
    )
    runner.train()
    assert f'{NONE}spare.0.weight, spare.0.bias' in log_of(tmp_path)


class FreezesInTrain(Toy):
    """As MobileNetV2 and stock Swins do."""

    def train(self, mode=True):
        super().train(mode)
        self.spare.requires_grad_(False)
        return self


def test_what_freezes_in_train(tmp_path):
    runner_of(tmp_path / 'a', FreezesInTrain(spare=True)).train()
    assert NONE not in log_of(tmp_path / 'a')
    assert 'all of the 9 frozen tensors' in log_of(tmp_path / 'a')

    def write(model):
        model.spare[0].weight += 1

    model, hooks = FreezesInTrain(spare=True), [DoHook(write, [2])]
    failing(
        runner_of(tmp_path / 'b', model, hooks=hooks),
        'Iteration 2: .* has changed since iteration 1: spare.0.weight. ',
    )


def test_what_a_hook_freezes_later(tmp_path):
    def freeze(model):
        model.spare.requires_grad_(False)

    hooks = [DoHook(freeze, [2])]
    runner_of(tmp_path, Toy(spare=True), hooks=hooks).train()
    assert NONE not in log_of(tmp_path)


def test_a_run_of_two_steps_is_left_alone(tmp_path):
    runner_of(
        tmp_path,
        Toy(spare=True),
        train_cfg=dict(by_epoch=False, max_iters=2),
    ).train()
    assert NONE not in log_of(tmp_path)


def test_a_gradient_in_one_of_the_steps_is_enough(tmp_path):
    class Sometimes(Toy):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            losses = super().forward(inputs, data_samples, mode)
            if data_samples[0].img_path == '4.jpg':
                losses['loss_spare'] = self.spare[0](inputs[0]).sum()
            return losses

    runner_of(tmp_path, Sometimes(spare=True)).train()
    assert NONE not in log_of(tmp_path)


def test_many_names_are_cut_short(tmp_path):
    model = Toy(spare=True)
    model.spare.extend(nn.Linear(2, 2) for _ in range(7))
    runner_of(tmp_path, model).train()
    assert 'spare.4.bias and 6 more, so' in log_of(tmp_path)


@pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='scales on GPUs alone'
)
def test_steps_that_a_loss_scaler_leaves_out_do_not_count():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = _Gradients(model, set(), [optimizer])
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    for factor in (INF, 1.0, INF, 1.0, 1.0):
        assert gradients.steps < 3
        optimizer.zero_grad()
        loss = (model(torch.ones(2)) * factor).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert gradients.steps == 3 and gradients.looks
    assert gradients.absent() == gradients.zero() == []
    gradients.remove()
    assert not gradients.looks
    assert not optimizer._optimizer_step_pre_hooks


def segmentor(folder, hooks='', more='', head='in_index=3'):
    """A segmentor of four iterations with a side path, and the guard."""
    make_segmentation(folder)
    config, _, _ = side_path_config(
        folder,
        segmentation_config(folder),
        'decode_head=dict(in_channels=256, '
        f"norm_cfg=dict(type='BN'), {head}), auxiliary_head=None",
        f"""
custom_hooks = [dict(type='e3va_mm.TrainingGuardHook'), {hooks}]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
{more}
""",
    )
    return Runner.from_cfg(Config.fromfile(config))


# Its three other outputs are not read.
LAST = 'model["backbone"]["out_indices"] = (3, )\n'


def test_a_side_path_without_gradient(tmp_path):
    text = failing(segmentor(tmp_path), 'Iteration 3: .* no gradient has come')
    assert 'backbone.norm0.weight' in text and 'out_indices' in text


def test_a_side_path_whose_gradients_stay_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(training_guard_hook, 'ZERO_STEPS', 4)
    loss = "loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.)"
    runner = segmentor(tmp_path, more=LAST, head=f'in_index=0, {loss}')
    text = failing(runner, 'Iteration 4: in 4 .* all gradients were zero in t')
    assert 'backbone.side_path.' in text
    assert 'decode_head' not in text
    (log,) = tmp_path.glob('work/*/*.log')
    assert log.read_text().count(WARNING) == 1


WARNING = 'guard: in 3 steps of the optimizer all gradients were zero in the s'


def test_a_side_path_whose_gradients_are_zero_at_first(tmp_path, monkeypatch):
    """As in a warm-up in fp16."""
    monkeypatch.setattr(training_guard_hook, 'ZERO_STEPS', 8)
    more = LAST + 'train_cfg.update(max_iters=9)\n'
    runner = segmentor(tmp_path, more=more, head='in_index=0')
    for parameter in runner.model.backbone.side_path.parameters():
        parameter.register_hook(lambda g: g * (runner.iter > 3))
    runner.train()
    assert runner.iter == 9
    (log,) = tmp_path.glob('work/*/*.log')
    assert log.read_text().count(WARNING) == 1
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_zeros_and_no_gradient_by_turns():
    model = nn.Linear(2, 2)
    model.trunk_state = None
    model.declared = model.parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = _Gradients(model, set(), [optimizer])
    for value in (0.0, None, 1.0):
        assert gradients.zero() == ['weight', 'bias'] * bool(gradients.steps)
        for parameter in model.parameters():
            parameter.grad = (
                None if value is None else torch.full_like(parameter, value)
            )
        optimizer.step()
    assert gradients.zero() == gradients.absent() == []


@pytest.mark.parametrize('weights', ['fp32', 'bf16'])
def test_a_side_path_that_learns(tmp_path, weights):
    more = LAST + (
        f'model["backbone"]["side_path"] = dict(trunk_weights={weights!r})\n'
    )
    runner = segmentor(tmp_path, more=more, head='in_index=0')
    runner.train()
    key = 'stages.0.blocks.0.attn.w_msa.qkv'
    dtype = runner.model.backbone.get_submodule(key).weight.dtype
    assert dtype == (torch.bfloat16 if weights == 'bf16' else torch.float32)


# ---- what is frozen


def write(model):
    model.trunk[0].weight += 1e-6


def write_one(model):
    model.trunk[0].weight[1, 1] += 1e-6


def let_the_norm_run(model):
    model.norm_runs = True


@pytest.mark.parametrize(
    'what, at, guard, text',
    [
        (write, 1, {}, '1: what is frozen has changed since iteration 0: tr'),
        (write, 2, {}, '2: .* iteration 1: trunk.0.weight. '),
        (write, 4, dict(interval=4), '4: .* iteration 3: trunk.0.weight. '),
        (write, 4, dict(interval=5), '5: .* iteration 3: trunk.0.weight. '),
        (write, 4, {}, '5: .* iteration 0: trunk.0.weight. '),
        (write_one, 1, {}, '5: .* iteration 0: trunk.0.weight. '),
        (
            let_the_norm_run,
            1,
            {},
            '2: .*since iteration 1: trunk.1.running_mean, trunk.1.running_v',
        ),
    ],
)
def test_a_frozen_tensor_that_changes(tmp_path, what, at, guard, text):
    runner = runner_of(tmp_path, guard=guard, hooks=[DoHook(what, [at])])
    assert 'may_change=[' in failing(runner, f'^Iteration {text}')


@pytest.mark.parametrize('path', ['trunk', 'trunk.0', 'trunk.0.weight'])
def test_what_may_change(tmp_path, path):
    guard = dict(may_change=[path])
    runner_of(tmp_path, guard=guard, hooks=[DoHook(write, [1])]).train()


def test_buffers_that_may_change(tmp_path):
    guard = dict(may_change=['trunk.1.*'])
    with pytest.raises(TrainingError, match=': trunk.1.running_mean'):
        hooks = [DoHook(let_the_norm_run, [1])]
        runner_of(tmp_path, hooks=hooks).train()
    runner_of(tmp_path, None, guard, hooks).train()


def test_what_a_hook_lets_train_later(tmp_path):
    def thaw(model):
        model.trunk.requires_grad_(True)
        model.norm_runs = True

    runner = runner_of(tmp_path, hooks=[DoHook(thaw, [2])])
    runner.train()
    assert runner.model.trunk[1].num_batches_tracked == 3
    assert 'frozen tensors are what they were' in log_of(tmp_path)


class Averaging(Toy):
    """As MoCo and BYOL: an average of the model is part of it."""

    def __init__(self):
        super().__init__()
        self.average = ExponentialMovingAverage(self.norm, momentum=0.1)

    def forward(self, *args, **kwargs):
        self.average.update_parameters(self.norm)
        return super().forward(*args, **kwargs)


def test_an_average_inside_of_the_model(tmp_path):
    runner = runner_of(tmp_path, Averaging())
    before = runner.model.average.module.weight.clone()
    runner.train()
    assert runner.model.average.steps == 5
    assert not torch.equal(before, runner.model.average.module.weight)


class Student(Toy):
    def __init__(self):
        super().__init__()
        self.student = self.norm
        self.teacher = copy.deepcopy(self.norm).requires_grad_(False)


@pytest.mark.parametrize('known', [True, False])
def test_a_teacher_that_a_hook_averages_into(tmp_path, known):
    module = pytest.importorskip('mmdet.engine.hooks')
    kind = module.MeanTeacherHook
    if not known:
        run = kind.after_train_iter
        kind = type('Own', (Hook,), dict(momentum_update=kind.momentum_update))
        kind.after_train_iter = run
        kind.momentum, kind.interval, kind.skip_buffers = 0.1, 1, True
    hook = kind() if not known else kind(momentum=0.1)
    runner = runner_of(tmp_path, Student(), hooks=[hook])
    if known:
        before = runner.model.teacher.weight.clone()
        runner.train()
        assert not torch.equal(before, runner.model.teacher.weight)
    else:
        failing(runner, 'Iteration .*: teacher.(weight|bias)')


def test_a_trunk_in_16_bits_that_changes(tmp_path):
    def write(model):
        model.backbone.stages[0].blocks[0].attn.w_msa.qkv.weight.mul_(1.5)

    more = LAST + (
        'model["backbone"]["side_path"] = dict(trunk_weights="bf16")\n'
    )
    runner = segmentor(tmp_path, more=more, head='in_index=0')
    runner.register_hook(DoHook(write, [2]))
    failing(runner, 'Iteration 2: .* backbone.stages.0.blocks.0.attn.w_msa.q')


def test_resuming_remembers_what_was_loaded(tmp_path):
    short = dict(by_epoch=False, max_iters=2)
    first = runner_of(tmp_path / 'a', train_cfg=short)
    first.train()
    second = runner_of(
        tmp_path / 'b',
        load_from=str(tmp_path / 'a' / 'iter_2.pth'),
        resume=True,
        hooks=[DoHook(write, [4])],
    )
    failing(second, 'Iteration 4: .* has changed since iteration 3')
    key = 'trunk.0.bias'
    weights = [r.model.state_dict()[key] for r in (first, second)]
    assert torch.equal(*weights)


# ---- options and runners


@pytest.mark.parametrize(
    'options, text',
    [
        (dict(interval=0), '`interval` should be a whole number .* got 0'),
        (dict(interval=2.5), '`interval` .* got 2.5'),
        (dict(interval=True), '`interval` .* got True'),
        (dict(may_change='trunk'), "`may_change` .* got the string 'trunk'"),
        (dict(without_gradient='a'), '`without_gradient` should be a list'),
    ],
)
def test_options_that_cannot_work(options, text):
    with pytest.raises(ConfigError, match=f'^TrainingGuardHook: {text}'):
        TrainingGuardHook(**options)


@pytest.mark.parametrize('option', ['without_gradient', 'may_change'])
def test_paths_that_match_nothing(tmp_path, option):
    runner = runner_of(tmp_path, guard={option: ['trnuk']})
    text = "No part of Toy fits the path 'trnuk'. Nearest are: .*trunk"
    with pytest.raises(ConfigError, match=text):
        runner.train()


def test_other_runners(tmp_path):
    make_coco(tmp_path, 'train')
    config = detection_config(
        tmp_path,
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
        custom_hooks=[dict(type='e3va_mm.TrainingGuardHook')],
    )
    FlexibleRunner.from_cfg(Config.fromfile(config)).train()
    (log,) = tmp_path.glob('work/*/*.log')
    assert 'frozen tensors are what they were' in log.read_text()


def test_compiled_steps(tmp_path):
    cfg = dict(compile=dict(backend='eager'))
    runner_of(tmp_path, Toy(spare=True), cfg=cfg).train()
    assert f'in 3 steps of the optimizer {NONE}spare' in log_of(tmp_path)


def test_a_run_that_diverges_under_the_frameworks_own_train(tmp_path):
    """Sound runs of both frameworks are in ``test_freeze_hook.py``."""
    make_coco(tmp_path, 'train', 8)
    config = detection_config(
        tmp_path,
        custom_hooks=[dict(type='e3va_mm.TrainingGuardHook')],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e20)),
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
    )
    done = stock_train('mmdet', Path(config))
    assert done.returncode != 0
    text = done.stderr
    assert 'TrainingError: Iteration 2: the loss is not finite.' in text
    assert re.search(
        r'Loss terms: loss nan, loss_rpn_cls nan, .*s0\.acc', text
    )
    (pictures,) = re.findall(r'Pictures: (\S+), (\S+)\n', text)
    assert all(Path(each).is_file() for each in pictures)
    assert saved(tmp_path / 'work') == []


@HOOKS.register_module()
class SpoilBatchHook(Hook):
    """Gives one process a picture of NaN, in the third iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2 and runner.rank == 1:
            picture = data_batch['inputs'][0]
            data_batch['inputs'][0] = torch.full(picture.shape, NAN)


def test_one_process_of_two_ends_both(tmp_path):
    """And the other, whose loss is finite, writes no broken weights."""
    make_segmentation(tmp_path)
    config = segmentation_config(
        tmp_path,
        custom_imports=dict(
            imports='tests.test_engine.test_hooks.test_training_guard_hook'
        ),
        custom_hooks=[dict(type='SpoilBatchHook')],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=5),
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
    )
    with open(config, 'a') as file:
        file.write("\ndefault_hooks['checkpoint'].update(interval=1)\n")
    process = launched('dist_train', config, 2, cwd=tmp_path)
    assert process.returncode != 0
    # Which of them comes first is a matter of chance; the hook is the tool's.
    found = re.findall(
        r'error: Iteration 3 \(process (\d)\): (.*) is not finite',
        process.stderr,
    )
    assert found, process.stderr[-3000:]
    assert set(found) <= {('0', 'what trains'), ('1', 'the loss')}
    assert saved(tmp_path / 'work') == ['iter_1.pth', 'iter_2.pth']
    for path in (tmp_path / 'work').glob('*.pth'):
        state = torch.load(path, weights_only=False)['state_dict']
        assert all(value.isfinite().all() for value in state.values())
