"""Tasks that train together, from the config to the adapter file of each."""

import numpy as np
import pytest

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.commands import adapter, train
from e3va_mm.weights import read_adapter
from tests.test_apis.tuned import tuned_apart
from tests.test_engine.test_hooks.tiny import make_coco

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
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook'),
    dict(type='e3va_mm.DatasetCheckHook')]
work_dir = {work_dir!r}
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The config of a training, the folder of its run, those of its tasks."""
    folder = tmp_path_factory.mktemp('together')
    tuned = tuned_apart(folder)
    make_coco(folder, 'train')
    tasks = {name: tuned[name].config for name in ('boxes', 'parts')}
    config, work = folder / 'both.py', folder / 'work'
    config.write_text(CONFIG.format(tasks=tasks, work_dir=str(work)))
    assert train.main([str(config)]) == 0
    (log,) = work.glob('*/*.log')
    for loss in ('boxes.loss_rpn_cls', 'parts.decode.loss_ce'):
        assert loss in log.read_text()
    return str(config), work, tasks


def test_each_task_has_its_adapter_file(trained, tmp_path, error):
    _, work, tasks = trained
    together = f'{work}/adapter_epoch_3.safetensors'
    infer = MultiTaskInferencer(device='cpu')
    for name, config in tasks.items():
        out = f'{tmp_path}/{name}.safetensors'
        assert adapter.main(['task', together, name, config, out]) == 0
        classes = read_adapter(out).dataset_meta['classes']
        assert classes == ('cat', 'dog', 'bird')
        infer.add(name, config, out)
    assert infer.on_trunk_of('boxes') == ['parts']
    found = infer(str(work.parent / 'images'))
    assert all(b['labels'] for b in found['boxes']['predictions'])
    classes = np.unique(found['parts']['predictions'])
    assert set(classes) <= {0, 1, 2}
    assert "Expected a task, one of ['boxes', 'parts']" in error(
        adapter, 'task', together, 'kinds', config, out
    )


def test_the_data_of_each_task_is_checked(trained, tmp_path, error):
    config, _, tasks = trained
    wrong = tmp_path / 'wrong.py'
    wrong.write_text(
        f'_base_ = {tasks["parts"]!r}\n'
        'model = dict(decode_head=dict(num_classes=7))\n'
    )
    options = ['--cfg-options', f'model.tasks.parts={wrong}']
    text = error(train, config, '--work-dir', tmp_path / 'work', *options)
    assert 'train_dataloader.dataset.tasks.parts' in text
    assert 'model.decode_head.num_classes' in text
    assert 'expected 3' in text


def test_a_run_goes_on(trained, capfd):
    config, work, _ = trained
    options = ['--cfg-options', 'train_cfg.max_epochs=4']
    assert train.main([config, '--resume', *options]) == 0
    log = capfd.readouterr().out
    assert 'Epoch(train) [4]' in log
    assert 'Epoch(train) [1]' not in log
    assert (work / 'adapter_epoch_4.safetensors').is_file()
