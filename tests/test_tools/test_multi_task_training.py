"""Tasks that train together, from the config to the adapter file of each."""

import numpy as np
import pytest

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.weights import read_adapter
from tests.test_apis.tuned import tuned_apart
from tests.test_engine.test_hooks.tiny import make_coco
from tests.test_tools.test_train_test import run

CONFIG = """
_base_ = ['mmdet::_base_/default_runtime.py']
tasks = {tasks}
model = dict(type='e3va_mm.MultiTaskModel', tasks=tasks)
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='e3va_mm.MultiTaskDataset', tasks=tasks))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3),
    constructor='e3va_mm.SidePathOptimWrapperConstructor')
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type='e3va_mm.AdapterCheckpointHook')]
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a training, and the configs of its tasks."""
    folder = tmp_path_factory.mktemp('together')
    tuned = tuned_apart(folder)
    make_coco(folder, 'train')
    tasks = {name: tuned[name].config for name in ('boxes', 'parts')}
    (folder / 'both.py').write_text(CONFIG.format(tasks=tasks))
    done = run('train.py', 'both.py', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'boxes.loss_rpn_cls' in done.stderr + done.stdout
    assert 'parts.decode.loss_ce' in done.stderr + done.stdout
    return folder, tasks


def test_each_task_has_its_adapter_file(trained):
    folder, tasks = trained
    together = 'work_dirs/both/adapter_epoch_3.safetensors'
    infer = MultiTaskInferencer(device='cpu')
    for name, config in tasks.items():
        out = folder / f'{name}_of_both.safetensors'
        done = run(
            'adapter.py', 'task', together, name, config, out, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        assert read_adapter(out).dataset_meta['classes'] == (
            'cat',
            'dog',
            'bird',
        )
        infer.add(name, config, str(out))
    assert infer.on_trunk_of('boxes') == ['parts']
    found = infer(str(folder / 'images'))
    assert all(b['labels'] for b in found['boxes']['predictions'])
    classes = np.unique(found['parts']['predictions'])
    assert set(classes) <= {0, 1, 2}
    done = run(
        'adapter.py', 'task', together, 'kinds', config, out, cwd=folder
    )
    assert "Expected a task, one of ['boxes', 'parts']" in done.stderr


def test_the_data_of_each_task_is_checked(trained):
    folder, tasks = trained
    wrong = folder / 'wrong.py'
    wrong.write_text(
        f'_base_ = {tasks["parts"]!r}\n'
        'model = dict(decode_head=dict(num_classes=7))\n'
    )
    done = run(
        'train.py',
        'both.py',
        '--work-dir',
        'checked',
        '--cfg-options',
        f'model.tasks.parts={wrong}',
        cwd=folder,
    )
    assert done.returncode == 1
    assert 'train_dataloader.dataset.tasks.parts has 3 classes' in done.stderr
    assert 'model.decode_head.num_classes: expected 3, received 7' in (
        done.stderr
    )


def test_a_run_goes_on(trained):
    folder, _ = trained
    done = run(
        'train.py',
        'both.py',
        '--resume',
        '--cfg-options',
        'train_cfg.max_epochs=4',
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [4]' in done.stderr + done.stdout
    assert 'Epoch(train) [1]' not in done.stderr + done.stdout
    assert (folder / 'work_dirs/both/adapter_epoch_4.safetensors').is_file()
