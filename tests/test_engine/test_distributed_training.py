"""Two processes train and test the digits config by the scripts."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, DefaultScope

from e3va_mm.datasets.digits import build_dataset
from tests.dist_scripts import launched

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'cascade_e3va_swin_nano_digits.py'
WORLD = 2
STEPS = 2
IMAGES = 1  # of one process in one step
# The processes import this module: it has the hook.
SMALL = f"""
_base_ = {str(CONFIG)!r}
custom_imports = dict(
    imports='tests.test_engine.test_distributed_training')
custom_hooks = _base_.custom_hooks + [dict(type='RecordShardHook')]
train_cfg = dict(max_epochs=1, val_begin=2)
here = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(here, batch_size={IMAGES})
val_dataloader = here
test_dataloader = here
"""


@HOOKS.register_module()
class RecordShardHook(Hook):
    """Seeds each shard of each step, and writes all that it depends on."""

    def before_train(self, runner):
        step = runner.optim_wrapper.step

        def record_and_step(**kwargs):
            # Reduced by now, and not clipped yet.
            self.record['gradients'] = gradients_of(runner.model.module)
            name = f'step{runner.iter}_rank{runner.rank}.pt'
            torch.save(self.record, Path(runner.work_dir) / name)
            step(**kwargs)

        runner.optim_wrapper.step = record_and_step

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.record = dict(
            batch=copy.deepcopy(data_batch),
            state=copy.deepcopy(runner.model.module.state_dict()),
        )
        # RoIs are drawn from here on.
        torch.manual_seed(seed_of(runner.iter, runner.rank))


def seed_of(step, rank):
    return WORLD * step + rank


def gradients_of(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gradients_alone(model, record, seed):
    """The gradients of one shard in this one process, without DDP."""
    model.load_state_dict(record['state'])
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    data = model.data_preprocessor(record['batch'], training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    return gradients_of(model)


def run(script, *arguments, cwd):
    process = launched(script, *arguments, cwd=cwd)
    assert process.returncode == 0, process.stderr
    return process.stdout


def images(record):
    return [sample.img_path for sample in record['batch']['data_samples']]


@pytest.fixture
def folder(tmp_path):
    build_dataset(
        tmp_path / 'data' / 'digits',
        train=WORLD * STEPS * IMAGES,
        val=1,
        test=3,
        size=96,
    )
    (tmp_path / 'small.py').write_text(SMALL)
    return tmp_path


def test_gradients_are_exactly_the_mean_of_the_shards(folder):
    """And what was trained is tested: processes are slow to start."""
    out = run('dist_train', 'small.py', WORLD, cwd=folder)
    assert out.count('Trainable parameters') == 1
    work = folder / 'work_dirs' / 'small'
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(CONFIG).model)
    seen = []
    for step in range(STEPS):
        records = [
            torch.load(work / f'step{step}_rank{rank}.pt', weights_only=False)
            for rank in range(WORLD)
        ]
        for record in records:
            seen += images(record)
        first, second = (record['state'] for record in records)
        assert all(torch.equal(first[name], second[name]) for name in first)
        shards = [
            gradients_alone(model, record, seed_of(step, rank))
            for rank, record in enumerate(records)
        ]
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        for record in records:
            assert record['gradients'].keys() == trained
            for name, got in record['gradients'].items():
                a, b = (shard[name] for shard in shards)
                assert torch.equal(got, (a + b) / 2), (step, name)
    # No image twice, and gradients everywhere once the adapters have begun.
    assert len(set(seen)) == len(seen) == WORLD * STEPS * IMAGES
    assert not torch.equal(a, b)
    assert all(got.any() for got in records[0]['gradients'].values())

    out = run(
        'dist_test',
        'small.py',
        work / 'epoch_1.pth',
        WORLD,
        '--out',
        'predictions.pkl',
        cwd=folder,
    )
    assert out.count('coco/bbox_mAP: ') == 1
    # The odd image is not counted twice.
    predictions = pickle.loads((folder / 'predictions.pkl').read_bytes())
    assert len({p['img_id'] for p in predictions}) == len(predictions) == 3
