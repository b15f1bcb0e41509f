"""Every config of the repository trains, and is what it says."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope

from e3va_mm.engine.checkpointing import is_checkpointed
from e3va_mm.measure import TrainingStep
from e3va_mm.registry import MODELS
from e3va_mm.utils import count_parameters
from tests.helpers import TINY

CONFIGS = Path(__file__).parents[1] / 'configs'
SIZE = (64, 64)
ALL = sorted(CONFIGS.glob('*.py'))
ONE_CARD = [path for path in ALL if re.search(r'_\d+gb$', path.stem)]

every_config = pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
every_one_card = pytest.mark.parametrize(
    'path', ONE_CARD, ids=lambda p: p.stem
)


def header(path):
    return path.read_text().split('"""')[1]


def shrunk(config):
    """The config with a tiny trunk and small pictures, for a CPU."""
    if 'size' in config.model.data_preprocessor:
        config.model.data_preprocessor.size = SIZE
    backbone = config.model.backbone
    width = backbone.embed_dims
    backbone.update(TINY)
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        part = config.model.get(part)
        if part:
            given = part.in_channels
            part.in_channels = (
                given * TINY['embed_dims'] // width
                if isinstance(given, int)
                else [n * TINY['embed_dims'] // width for n in given]
            )
    for head in config.model.get('roi_head', {}).get('bbox_head', []):
        head.fc_out_channels = 32
    side_path = backbone.get('side_path', {})
    for option in ('trunk_compute', 'trunk_weights'):
        if option in side_path:
            side_path[option] = 'bf16'
    return config


def test_the_sweep_is_not_empty():
    assert len(ALL) >= 10
    assert len(ONE_CARD) == 3


@every_config
def test_a_step(path):
    """A step on generated input: what should train does, and stays finite."""
    config = shrunk(Config.fromfile(path))
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


@pytest.mark.parametrize(
    'path',
    [path for path in ALL if 'nano' not in path.stem],
    ids=lambda p: p.stem,
)
def test_header_says_what_trains(path):
    stated, share = re.search(
        r'Trains ([\d,]+) values in the backbone \((.+) %\)', header(path)
    ).groups()
    config = Config.fromfile(path)
    backbone = config.model.backbone.to_dict()
    # Weights are out of reach, and how the trunk computes does not count.
    del backbone['init_cfg']
    backbone.pop('side_path', None)
    trainable, stock = counts(
        config.default_scope, json.dumps(backbone, sort_keys=True)
    )
    assert f'{trainable:,}' == stated
    assert f'{100 * trainable / stock:.2f}' == share


@pytest.mark.parametrize(
    'name, trainable',
    [
        ('cascade_e3va_swin_b_coco.py', '1,195,008'),
        ('cascade_e3va_swin_l_coco.py', '1,792,512'),
        ('retinanet_e3va_swin_l_voc.py', '1,792,128'),
        ('upernet_e3va_swin_l_ade20k.py', '1,792,512'),
    ],
)
def test_counts_are_those_published(name, trainable):
    assert f'Trains {trainable} values' in header(CONFIGS / name)


def test_trunk_and_weights_file_are_the_same_variant():
    checked = 0
    for path in ALL:
        backbone = Config.fromfile(path).model.backbone
        for name, width in (('swin_base_', 128), ('swin_large_', 192)):
            if name in backbone.init_cfg.checkpoint:
                assert backbone.embed_dims == width, path
                checked += 1
    assert checked == 7


@every_one_card
def test_one_card_updates_as_the_config_it_comes_from(path):
    config = Config.fromfile(path)
    parent = Config.fromfile(CONFIGS / re.sub(r'_\d+gb', '', path.name))
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
            Config.fromfile(path).custom_hooks[-1].modules
        )
        for path in ONE_CARD
    }
    assert modules[11] < modules[8] < modules[6]


def test_parsing_needs_nothing_of_ours():
    """The frameworks' own tools read a config before they import us."""
    code = """
import sys
from mmengine.config import Config
for path in sys.argv[1:]:
    Config.fromfile(path)
print([name for name in sys.modules if name.startswith('e3va_mm')])
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *map(str, ALL)],
        cwd='/',
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == '[]'
