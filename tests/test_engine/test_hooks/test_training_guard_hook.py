"""Runs that cannot come to anything end at once; all others go on."""

import time

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from e3va_mm.engine.hooks import TrainingGuardHook
from e3va_mm.errors import ConfigError, TrainingError
from e3va_mm.utils.batches import images_of
from e3va_mm.utils.tuned import TunedModule

NAN, INF = float('nan'), float('inf')


class Toy(BaseModel):
    """A head that trains; ``spare`` is in no loss."""

    def __init__(self, spare=None):
        super().__init__()
        self.head = nn.Linear(2, 1)
        if spare is not None:
            self.spare = spare
        self.factors = {}

    def forward(self, inputs, data_samples=None, mode='tensor'):
        output = self.head(torch.stack(inputs))
        here = {int(s.img_path[0]) for s in data_samples}
        factor = sum(v for k, v in self.factors.items() if k in here) or 1.0
        return {
            'loss_near': output.square().mean(),
            'loss_far': output.abs().mean() * factor,
            'acc': output.new_tensor(NAN),
        }


class Backbone(nn.Linear, TunedModule):
    """Declares its weight, but not its bias."""

    has_graph, petl = True, None

    def declared(self):
        return [self.weight]


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        sample = BaseDataElement(metainfo=dict(img_path=f'{index}.jpg'))
        return dict(inputs=torch.randn(2) + index, data_samples=sample)


class DoHook(Hook):
    """Does something to the model after an iteration, counted from 1."""

    priority = 'VERY_HIGH'

    def __init__(self, what, at):
        self.what, self.at = what, at

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.at:
            with torch.no_grad():
                self.what(runner.model)


def runner_of(folder, model=None, guard=None, hooks=(), **options):
    """A stock runner of five iterations, two images in each, in order."""
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-3))
    optim_wrapper.update(options.pop('optim_wrapper', {}))
    return Runner(
        model=model or Toy(),
        work_dir=str(folder),
        experiment_name=f'guard{time.monotonic_ns()}',
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Images(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=options.pop('iters', 5)),
        optim_wrapper=optim_wrapper,
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=False,
                interval=1,
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


def test_a_sound_run_with_options_of_older_configs(tmp_path):
    guard = dict(interval=10, may_change=['spare'])
    runner = runner_of(tmp_path, guard=guard)
    runner.train()
    assert saved(tmp_path) == ['iter_5.pth']
    log = log_of(tmp_path)
    assert log.count('`interval` and `may_change` have no effect') == 1
    assert 'WARNING - Iteration' not in log
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


# ---- loss and weights


@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_a_loss_that_is_not_finite(tmp_path, value):
    model = Toy()
    model.factors = {4: value}
    text = failing(runner_of(tmp_path, model))
    assert text.startswith('Iteration 3: the loss is not finite.\n')
    term = f'{value:.6g}'
    assert f'Loss terms: loss {term}, loss_near ' in text
    assert f', loss_far {term}, acc nan\n' in text
    assert 'Images: 4.jpg, 5.jpg\n' in text
    assert 'Weights that are not finite: head.' in text
    assert f'Last checkpoint: {tmp_path / "iter_2.pth"}\n' in text
    assert 'clip_grad' in text
    assert saved(tmp_path) == ['iter_2.pth']


def spoil(model):
    model.head.weight[0, 1] = INF


def test_broken_weights_replace_no_checkpoint(tmp_path):
    """The loss was finite; mmengine removes the older file first."""
    text = failing(runner_of(tmp_path, hooks=[DoHook(spoil, 3)]))
    assert text.startswith('Iteration 3: what trains is not finite.')
    assert 'Weights that are not finite: head.weight\n' in text
    assert saved(tmp_path) == ['iter_2.pth']
    text = failing(runner_of(tmp_path / 'a', hooks=[DoHook(spoil, 1)]))
    assert 'Last checkpoint: none\n' in text


def test_images_in_all_forms_of_a_batch():
    def sample(**metainfo):
        return BaseDataElement(metainfo=metainfo)

    video = BaseDataElement(metainfo=dict(ori_length=2))
    video.video_data_samples = [sample(img_path='f.jpg')]
    several = dict(
        inputs=dict(sup=[torch.ones(2)], other=[]),
        data_samples=dict(
            sup=[sample(img_path='s.jpg', img_shape=(4, 6))],
            teacher=[sample(img_path='t.jpg')],
        ),
    )
    for batch, images in [
        (None, []),
        (dict(inputs=torch.ones(2), data_samples=None), []),
        (dict(data_samples=[sample(img_id=1)]), []),
        (dict(data_samples=sample(img_path='a.jpg')), [('a.jpg', ())]),
        (sample(img_path=['a', 'b']), [('a', ()), ('b', ())]),
        (several, [('s.jpg', (4, 6)), ('t.jpg', ())]),
        ([dict(data_samples=[video])], [('f.jpg', ())]),
    ]:
        assert [*images_of(batch)] == images


def test_a_train_step_without_a_loss(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, TrainingGuardHook))
    hook.after_train_iter(runner, 0, None, dict(a=1, b=torch.ones(3) * NAN))
    hook.after_train_iter(runner, 0, None, None)
    with pytest.raises(TrainingError, match='Loss terms: a 1, b nan\n'):
        outputs = dict(a=1, b=torch.tensor([NAN]))
        hook.after_train_iter(runner, 0, None, outputs)


# ---- gradients

NONE = 'of the optimizer no gradient has come to '


@pytest.mark.parametrize('counts', [1, 2])
def test_a_parameter_without_gradient(tmp_path, counts):
    """One process trains fine with it."""
    runner = runner_of(
        tmp_path,
        Toy(nn.ModuleList([nn.Linear(2, 2) for _ in range(7)])),
        iters=8,
        optim_wrapper=dict(accumulative_counts=counts),
    )
    runner.train()
    before, text = log_of(tmp_path).split(f'in 3 steps {NONE}')
    assert text.startswith('spare.0.weight, ') and 'and 4 more. ' in text
    assert '`TrainingGuardHook(without_gradient=[' in text
    assert f'checkpoint at {3 * counts - 1} iterations' in before


def test_a_parameter_that_a_backbone_declares(tmp_path):
    text = failing(runner_of(tmp_path, Toy(Backbone(2, 2))))
    assert text.startswith(f'Iteration 3: in 3 steps {NONE}spare.weight. ')
    assert '`out_indices`' in text


def test_processes_that_wait_for_a_gradient(tmp_path, one_process):
    runner = runner_of(tmp_path / 'a', Toy(nn.Linear(2, 2)))
    runner.model = MMDistributedDataParallel(runner.model, device_ids=None)
    text = failing(runner, f'Iteration 1: in 1 step {NONE}spare.weight, spare')
    assert '`find_unused_parameters=True`' in text

    runner = runner_of(tmp_path / 'b', Toy(nn.Linear(2, 2)))
    runner.model = MMDistributedDataParallel(
        runner.model, device_ids=None, find_unused_parameters=True
    )
    runner.train()
    assert f'{NONE}spare.weight, spare.bias' in log_of(tmp_path / 'b')


class FreezesInTrain(Toy):
    """As MobileNetV2 and stock Swins do."""

    def train(self, mode=True):
        super().train(mode)
        self.spare.requires_grad_(False)
        return self


class Sometimes(Toy):
    """A gradient in one of the steps is enough."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        losses = super().forward(inputs, data_samples, mode)
        if data_samples[0].img_path == '4.jpg':
            losses['loss_spare'] = self.spare(inputs[0]).sum()
        return losses


def freeze(model):
    model.spare.requires_grad_(False)


@pytest.mark.parametrize(
    'kind, options',
    [
        (Toy, dict(guard=dict(without_gradient=['spare']))),
        (Toy, dict(guard=dict(without_gradient=['*.weight', 'spare.bias']))),
        (Toy, dict(hooks=[DoHook(freeze, 2)])),
        (Toy, dict(iters=2)),
        (FreezesInTrain, {}),
        (Sometimes, {}),
    ],
)
def test_what_is_meant_to_be_so(tmp_path, kind, options):
    runner_of(tmp_path, kind(Backbone(2, 2)), **options).train()
    assert NONE not in log_of(tmp_path)


def test_compiled_steps(tmp_path):
    cfg = dict(compile=dict(backend='eager'))
    runner_of(tmp_path, Toy(nn.Linear(2, 2)), cfg=cfg).train()
    assert f'in 3 steps {NONE}spare' in log_of(tmp_path)


# ---- options


@pytest.mark.parametrize('value', ['a', [1]])
def test_options_that_cannot_work(value):
    text = '^TrainingGuardHook: `without_gradient` should be a list'
    with pytest.raises(ConfigError, match=text):
        TrainingGuardHook(without_gradient=value)


def test_paths_that_match_nothing(tmp_path):
    runner = runner_of(tmp_path, guard=dict(without_gradient=['haed']))
    text = "No module or parameter of Toy fits the path 'haed'. .*: head"
    with pytest.raises(ConfigError, match=text):
        runner.train()
