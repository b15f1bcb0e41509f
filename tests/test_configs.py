"""Every config of the repository trains, and is what it says."""

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, DefaultScope

from e3va_mm.engine.checkpointing import is_checkpointed
from e3va_mm.measure import TrainingStep
from e3va_mm.registry import MODELS
from e3va_mm.utils import count_parameters
from tests.helpers import SWIN, TINY

CONFIGS = Path(__file__).parents[1] / 'configs'
SIZE = (64, 64)
WIDTH = 32
SAMPLES = 16
ALL = sorted(CONFIGS.glob('*.py'))
ONE_CARD = [path for path in ALL if re.search(r'_\d+gb$', path.stem)]
NANO = [path for path in ALL if '_nano_' in path.stem]
LARGE = [path for path in ALL if path not in NANO]
FAMILIES = {
    'cascade_e3va_swin_{}_coco': (0, 1, 2, 3),
    'cascade_e3va_swin_{}_coco_3x': (0, 1, 2, 3),
    'retinanet_e3va_swin_{}_voc': (1, 2, 3),
    'faster_rcnn_e3va_swin_{}_voc': (0, 1, 2, 3),
    'upernet_e3va_swin_{}_voc12': (0, 1, 2, 3),
    'upernet_e3va_swin_{}_ade20k': (0, 1, 2, 3),
}
WEIGHTS = dict(
    t='swin_tiny_patch4_window7_224.pth',
    s='swin_small_patch4_window7_224.pth',
    b='swin_base_patch4_window7_224_22k.pth',
    l='swin_large_patch4_window7_224_22k.pth',
)
PUBLISHED = dict(t=440_064, s=896_256, b=1_195_008, l=1_792_512)

every_config = pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
every_large = pytest.mark.parametrize('path', LARGE, ids=lambda p: p.stem)
every_one_card = pytest.mark.parametrize(
    'path', ONE_CARD, ids=lambda p: p.stem
)
every_family = pytest.mark.parametrize('family', FAMILIES)


def header(path):
    return path.read_text().split('"""')[1]


@functools.cache
def parsed(path):
    return Config.fromfile(path)


def load(path):
    """A config that may be changed; parsing takes long."""
    return copy.deepcopy(parsed(path))


def narrow(node):
    """Let all layers have few channels, and heads learn from few samples."""
    if isinstance(node, list | tuple):
        for value in node:
            narrow(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key.endswith('channels') and isinstance(value, int):
                node[key] = min(value, WIDTH)
            elif key == 'sampler':
                value.num = min(value.get('num', SAMPLES), SAMPLES)
            else:
                narrow(value)


def shrunk(config):
    """The config with a tiny trunk, small heads and pictures, for a CPU."""
    model = config.model
    if 'size' in model.data_preprocessor:
        model.data_preprocessor.size = SIZE
    backbone = model.pop('backbone')
    readers = {
        part: model[part].in_channels
        for part in ('neck', 'decode_head', 'auxiliary_head')
        if part in model
    }
    narrow(model)
    for part, given in readers.items():
        model[part].in_channels = (
            given * TINY['embed_dims'] // backbone.embed_dims
            if isinstance(given, int)
            else [n * TINY['embed_dims'] // backbone.embed_dims for n in given]
        )
    backbone.update(TINY)
    model.backbone = backbone
    side_path = backbone.get('side_path', {})
    for option in ('compute', 'trunk_compute', 'trunk_weights'):
        if option in side_path:
            side_path[option] = 'bf16'
    return config


def test_the_sweep_is_not_empty():
    assert len(ONE_CARD) == 3
    assert len(NANO) == 4
    assert sorted(path.stem for path in set(LARGE) - set(ONE_CARD)) == sorted(
        family.format(size) for family in FAMILIES for size in WEIGHTS
    )


@every_config
def test_a_step(path):
    """A step on generated input: what should train does, and stays finite."""
    config = shrunk(load(path))
    # Batch norms of maps of 1x1 need two pictures.
    step = TrainingStep(config, 'as-is', size=SIZE, batch=2, objects=3)
    wrapped = any(is_checkpointed(m) for m in step.model.modules())
    assert wrapped == (path in ONE_CARD)
    before = {
        name: parameter.detach().clone()
        for name, parameter in step.model.backbone.named_parameters()
        if 'up.q' in name or name.startswith('norm')
    }
    assert any('up.q' in name for name in before)
    step.run()
    for name, parameter in step.model.backbone.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    for name, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), name
    for scheduler in config.param_scheduler:
        PARAM_SCHEDULERS.build(
            scheduler,
            default_args=dict(optimizer=step.optim_wrapper, epoch_length=100),
        )


@functools.cache
def counts(scope, backbone):
    """Trainable and stock values of a backbone of full size."""
    with DefaultScope.overwrite_default_scope(scope):
        backbone = MODELS.build(json.loads(backbone))
    total, trainable = count_parameters(backbone)
    return trainable, total - count_parameters(backbone.side_path)[0]


@every_config
def test_header(path):
    text = header(path)
    assert f'\nRun: python tools/train.py configs/{path.name}\n' in text
    assert re.search(r'\n(Paper: https://|Data: python tools/)', text)
    assert re.search(r'\nExpected: \S', text)
    for name in re.findall(r'[\w/]+\.py', text):
        assert (CONFIGS / name).is_file() or (CONFIGS.parent / name).is_file()


@every_large
def test_header_says_how_to_test(path):
    assert (
        f'\nTest: python tools/test.py configs/{path.name} CHECKPOINT\n'
        in header(path)
    )


@every_config
def test_header_says_what_trains(path):
    text = header(path)
    stated, share = re.search(
        r'Trains ([\d,]+) values in the backbone \((.+) %\)', text
    ).groups()
    config = load(path)
    backbone = config.model.backbone.to_dict()
    # A class in a config of the new style.
    backbone['type'] = 'e3va_mm.E3VASwinTransformer'
    # Weights are out of reach, and how the trunk computes does not count.
    del backbone['init_cfg']
    backbone.pop('side_path', None)
    trainable, stock = counts(
        config.default_scope, json.dumps(backbone, sort_keys=True)
    )
    assert f'{trainable:,}' == stated
    assert f'{100 * trainable / stock:.2f}' == share
    (rate,) = re.findall(r'at a learning rate of (\S+);', text)
    assert float(rate) == config.optim_wrapper.optimizer.lr


@every_family
@pytest.mark.parametrize('size', WEIGHTS)
def test_a_family_has_every_size(family, size):
    path = CONFIGS / f'{family.format(size)}.py'
    backbone = parsed(path).model.backbone
    assert backbone.init_cfg.checkpoint == (
        'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
        + WEIGHTS[size]
    )
    for argument, value in SWIN[size].items():
        found = backbone[argument]
        assert (found if isinstance(found, int) else tuple(found)) == value
    out_indices = FAMILIES[family]
    assert tuple(backbone.get('out_indices', (0, 1, 2, 3))) == out_indices
    # A map that is not given out has no output norm.
    trained = PUBLISHED[size] - sum(
        2 * backbone.embed_dims * 2**stage
        for stage in {0, 1, 2, 3}.difference(out_indices)
    )
    assert f'Trains {trained:,} values' in header(path)
    assert f', Swin-{size.upper()} (ImageNet-' in header(path)
    pretrained = '22k' if '22k' in WEIGHTS[size] else '1k'
    assert f'(ImageNet-{pretrained})' in header(path)


@every_family
def test_sizes_differ_in_their_trunk_alone(family):
    rest = []
    for size in WEIGHTS:
        config = load(CONFIGS / f'{family.format(size)}.py')
        model = config.model
        widths = [model.backbone.embed_dims * 2**stage for stage in range(4)]
        for part in ('neck', 'decode_head'):
            if part in model:
                assert model[part].pop('in_channels') == [
                    widths[stage] for stage in FAMILIES[family]
                ]
        if 'auxiliary_head' in model:
            assert model.auxiliary_head.pop('in_channels') == widths[2]
        del model['backbone']
        rest.append(
            {
                key: value
                for key, value in config.to_dict().items()
                # Names for children; where stock configs name weights.
                if key not in ('trunk', 'widths', 'checkpoint_file')
            }
        )
    assert rest[0] == rest[1] == rest[2] == rest[3]


def test_the_recipe_of_swins_authors():
    config = parsed(CONFIGS / 'cascade_e3va_swin_b_coco_3x.py')
    heads = config.model.roi_head.bbox_head
    assert len(heads) == 3
    for head in heads:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert head.loss_bbox.type == 'GIoULoss' and head.reg_decoded_bbox
    assert config.train_cfg.max_epochs == 36
    assert config.param_scheduler[-1].milestones == [27, 33]
    _, _, _, jitter, _ = config.train_dataloader.dataset.pipeline
    whole, cropped = jitter.transforms
    assert [s for s, _ in whole[0].scales] == list(range(480, 801, 32))
    assert [step.type for step in cropped] == [
        'RandomChoiceResize',
        'RandomCrop',
        'RandomChoiceResize',
    ]
    wrapper = config.optim_wrapper
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )


def values(node, key):
    """All values of a key, at any depth."""
    if isinstance(node, list | tuple):
        return [found for value in node for found in values(value, key)]
    if not isinstance(node, dict):
        return []
    here = [node[key]] if key in node else []
    return here + values(list(node.values()), key)


@every_config
def test_heads_know_the_classes_of_the_data(path):
    config = parsed(path)
    dataset = config.test_dataloader.dataset
    classes = dataset.get('metainfo', {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(config.default_scope) as found:
            classes = found.get(dataset.type).METAINFO['classes']
    assert set(values(config.model, 'num_classes')) == {len(classes)}


def levels(path):
    """How many configs lie on the way to the stock one, it included."""
    parents = Config._get_base_files(str(path))
    return 1 + max(
        (
            levels(path.parent / parent) if parent.startswith('.') else 1
            for parent in parents
        ),
        default=0,
    )


@every_config
def test_at_most_three_levels(path):
    assert levels(path) <= 3


@every_one_card
def test_one_card_updates_as_the_config_it_comes_from(path):
    config = parsed(path)
    parent = parsed(CONFIGS / re.sub(r'_\d+gb', '', path.name))
    pictures = parent.auto_scale_lr.base_batch_size
    batch = config.train_dataloader.batch_size
    steps = config.optim_wrapper.accumulative_counts
    assert batch * steps == pictures
    assert f'{batch} of the {pictures} pictures' in header(path)
    assert f'on one card of {path.stem.split("_")[-1][:-2]} GB' in header(path)
    assert config.auto_scale_lr.base_batch_size == batch
    assert config.optim_wrapper.optimizer == parent.optim_wrapper.optimizer
    warm_up, *rest = config.param_scheduler
    assert warm_up.end == parent.param_scheduler[0].end * steps
    assert [scheduler.to_dict() for scheduler in rest] == [
        dict(scheduler, _scope_=rest[0]['_scope_'])
        for scheduler in parent.param_scheduler[1:]
    ]
    assert config.custom_hooks[:-1] == parent.custom_hooks
    assert config.model.backbone.side_path.preset == 'lean'


def test_smaller_cards_recompute_more():
    modules = {
        int(path.stem.split('_')[-1][:-2]): set(
            parsed(path).custom_hooks[-1].modules
        )
        for path in ONE_CARD
    }
    assert modules[11] < modules[8] < modules[6]


@every_config
def test_parsing_brings_the_safe_loaders(path):
    """Inferencers read a checkpoint before they build what imports us."""
    imports = Config.fromfile(path).get('custom_imports')
    if 'new_style' in path.stem:  # mmengine heeds no such key there
        assert imports is None
    else:
        assert imports.imports == ['e3va_mm.checkpoint']
        assert not imports.allow_failed_imports
