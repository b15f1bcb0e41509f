"""Tasks that train together are those that train apart."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope

from e3va_mm.errors import ConfigError
from e3va_mm.registry import DATASETS, MODELS
from tests.test_apis.tuned import tuned_apart
from tests.test_engine.test_hooks.tiny import make_coco


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """A detector and a segmentor, by the paths of their configs."""
    folder = tmp_path_factory.mktemp('tasks')
    tuned = tuned_apart(folder)
    make_coco(folder, 'train')
    return {name: tuned[name].config for name in ('boxes', 'parts')}


def build(configs, **kwargs):
    config = dict(type='e3va_mm.MultiTaskModel', tasks=configs, **kwargs)
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


@pytest.fixture(scope='module')
def model(configs):
    return build(configs)


@pytest.fixture(scope='module')
def batches(configs):
    dataset = DATASETS.build(
        dict(type='e3va_mm.MultiTaskDataset', tasks=configs)
    )
    batches = pseudo_collate([dataset[0], dataset[1]])
    # Images of one data set that is there for both tasks.
    batches['parts']['inputs'] = [
        image.clone() for image in batches['boxes']['inputs']
    ]
    return batches


def losses(model, batches):
    (prepared,) = model.data_preprocessor(copy.deepcopy(batches), True)
    torch.manual_seed(0)  # samplers of boxes draw
    return model(prepared, mode='loss')


def alone(model, batches, name):
    """The same of one task by its own model."""
    own = model.tasks[name]
    scope = dict(boxes='mmdet', parts='mmseg')[name]
    with DefaultScope.overwrite_default_scope(scope):
        batch = own.data_preprocessor(copy.deepcopy(batches[name]), True)
        torch.manual_seed(0)
        return own(**batch, mode='loss')


def gradients(model, found):
    model.zero_grad()
    model.parse_losses(found)[0].backward()
    return {
        name: value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def test_the_trunk_is_there_once(model):
    boxes, parts = (each.backbone for each in model.tasks.values())
    weight = 'stages.2.blocks.0.attn.w_msa.qkv.weight'
    assert boxes.get_parameter(weight) is parts.get_parameter(weight)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, task in model.tasks.items():
        for inner, value in task.named_parameters():
            assert value.requires_grad == (f'tasks.{name}.{inner}' in trains)


@pytest.mark.parametrize('equal', [True, False])
def test_losses_and_gradients_are_those_of_each_alone(model, batches, equal):
    if not equal:
        batches = copy.deepcopy(batches)
        batches['parts']['inputs'] = [
            image.flip(2) for image in batches['parts']['inputs']
        ]
    found = losses(model, batches)
    together = gradients(model, found)
    own_keys = set()
    for name in batches:
        own = alone(model, batches, name)
        assert {f'{name}.{key}' for key in own} <= set(found)
        apart = gradients(model, {f'{name}.{k}': v for k, v in own.items()})
        assert any('.side_path.' in key for key in apart)
        ours = torch.cat([together[key].flatten() for key in apart])
        theirs = torch.cat([value.flatten() for value in apart.values()])
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        own_keys |= set(apart)
    assert set(together) == own_keys


def test_one_pass_for_images_of_one_size(model, batches, monkeypatch):
    sizes = []
    trunk = type(model.tasks['boxes'].backbone.trunk)
    run = trunk.run
    monkeypatch.setattr(
        trunk,
        'run',
        lambda self, image, *args: (
            sizes.append(len(image)) or run(self, image, *args)
        ),
    )
    losses(model, batches)
    assert sizes == [2]  # equal images go through once
    other = copy.deepcopy(batches)
    other['parts']['inputs'] = [x + 1 for x in other['parts']['inputs']]
    losses(model, other)
    assert sizes == [2, 4]
    other['boxes']['inputs'] = [x[:, :32] for x in other['boxes']['inputs']]
    losses(model, other)
    assert sizes == [2, 4, 2, 2]


def test_weights_scale_losses(model, configs, batches):
    found = losses(model, batches)
    weighted = losses(build(configs, weights=dict(parts=0.5)), batches)
    for key, value in found.items():
        half = key.startswith('parts.') and 'loss' in key
        values = value if isinstance(value, list) else [value]
        ours = weighted[key]
        ours = ours if isinstance(ours, list) else [ours]
        for a, b in zip(ours, values, strict=True):
            torch.testing.assert_close(a, b * (0.5 if half else 1))


def test_predictions_by_task(model, batches):
    found = model.eval().test_step(copy.deepcopy(batches))
    model.train()
    assert len(found['boxes']) == len(found['parts']) == 2
    assert 'pred_instances' in found['boxes'][0]
    assert found['parts'][0].pred_sem_seg.shape == (48, 64)


def changed(path, folder, name, **backbone):
    config = Config.fromfile(path)
    if 'tuner' in backbone:
        config.model.backbone.pop('side_path', None)
    config.model.backbone.update(backbone)
    config.dump(folder / f'{name}.py')
    return str(folder / f'{name}.py')


@pytest.mark.parametrize(
    'backbone, message',
    [
        (
            dict(init_cfg=dict(type='Pretrained', checkpoint='other.pth')),
            'the same weights of the trunk, but `init_cfg` of `tasks.boxes`',
        ),
        (
            dict(tuner=dict(trunk_compute='bf16')),
            '`tasks.boxes` and `tasks.parts`: Expected two backbones with the '
            'same trunk, but trunk_compute is',
        ),
        (
            dict(tuner=dict(trunk_drop_path=0.1)),
            'the same `tuner.trunk_drop_path`, but that of `tasks.boxes` '
            'is 0.0 and that of `tasks.parts` 0.1',
        ),
    ],
)
def test_other_trunks_are_refused(configs, tmp_path, backbone, message):
    other = changed(configs['parts'], tmp_path, 'other', **backbone)
    with pytest.raises(ConfigError, match=message):
        build(dict(configs, parts=other))


@pytest.mark.parametrize(
    'weights', [dict(other=1.0), dict(parts=0), dict(parts='1')]
)
def test_wrong_weights_are_refused(configs, weights):
    with pytest.raises(ConfigError, match='`weights` should have a number'):
        build(configs, weights=weights)
