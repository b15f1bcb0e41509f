import copy

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from e3va_mm.comparison import (
    METHODS,
    SIDE_PATHS,
    method_config,
    run_config,
)
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import TINY
from tests.test_configs import CONFIGS

ALL = (*METHODS, *SIDE_PATHS)
DIGITS = [
    CONFIGS / f'{name}_e3va_swin_nano_digits.py'
    for name in ('cascade', 'upernet')
]
WEIGHTS = dict(type='Pretrained', checkpoint='weights.pth')

every_digits = pytest.mark.parametrize('path', DIGITS, ids=lambda p: p.stem)


def config(scope='mmdet', **backbone):
    model = dict(type='Any', backbone=backbone)
    return Config(dict(default_scope=scope, model=model))


def rest(config):
    found = config.to_dict()
    del found['model']['backbone']
    return found


@every_digits
def test_methods_differ_in_the_backbone_only(path):
    given = Config.fromfile(path)
    before = copy.deepcopy(given.to_dict())
    backbones = []
    for method in ALL:
        changed = method_config(given, method)
        assert rest(changed) == rest(given), method
        backbone = changed.model.backbone.to_dict()
        assert backbone.pop('drop_path_rate') == 0, method
        assert backbone['init_cfg'] == given.model.backbone.init_cfg
        assert 'side_path' not in backbone or method in SIDE_PATHS
        backbones.append(backbone)
    assert given.to_dict() == before, 'the original is left alone'
    for method, backbone in zip(METHODS, backbones, strict=False):
        assert backbone['type'] == 'e3va_mm.PETLSwinTransformer'
        assert backbone.pop('method') == METHODS[method]
    assert backbones[-1].pop('type') == 'e3va_mm.E3VASwinTransformer'
    stock = [
        {k: v for k, v in backbone.items() if k in given.model.backbone}
        for backbone in backbones
    ]
    for backbone in stock:
        backbone.pop('type', None)
    assert all(backbone == stock[0] for backbone in stock)


@every_digits
@pytest.mark.parametrize('method', ALL)
def test_every_method_builds(path, method):
    changed = method_config(Config.fromfile(path), method)
    with DefaultScope.overwrite_default_scope(changed.default_scope):
        backbone = MODELS.build(changed.model.backbone)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in backbone.parameters())
    assert (trained == 0) == (method == 'fixed')
    assert (trained == whole) == (method == 'full')


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_a_stock_swin_becomes_each_method(scope):
    given = config(
        scope, type=f'{scope}.SwinTransformer', init_cfg=WEIGHTS, **TINY
    )
    rival = method_config(given, 'lora').model.backbone
    assert rival.type == 'e3va_mm.PETLSwinTransformer'
    assert rival.method == dict(type='e3va_mm.LoRA')
    ours = method_config(given, 'e3va').model.backbone
    assert ours.type == 'e3va_mm.E3VASwinTransformer'
    for backbone in (rival, ours):
        assert backbone.init_cfg == WEIGHTS
        assert {k: backbone[k] for k in TINY} == TINY


def test_other_families_are_a_trunk():
    stock = dict(type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.4)
    rival = method_config(config(**stock), 'adapter').model.backbone
    assert rival.type == 'e3va_mm.PETLBackbone'
    assert rival.method == dict(type='e3va_mm.Adapter')
    ours = method_config(config(**stock), 'e3va').model.backbone
    assert ours.type == 'e3va_mm.E3VABackbone'
    for backbone in (rival, ours):
        assert backbone.trunk == dict(stock, drop_path_rate=0)


def test_no_method_has_the_drop_path_of_the_class():
    given = config(type='mmseg.SwinTransformer', **TINY)
    given.model.backbone.pop('drop_path_rate', None)
    for method in ALL:
        backbone = method_config(given, method).model.backbone
        assert backbone.drop_path_rate == 0, method
    resnet = config(type='mmdet.ResNet', depth=18)
    rival = method_config(resnet, 'norm').model.backbone
    assert rival.trunk == resnet.model.backbone


def test_what_stands_outside_our_trunk_is_kept():
    trunk = dict(type='mmpretrain.ConvNeXt', arch='tiny')
    layout = dict(blocks='stages')
    given = config(
        type='e3va_mm.E3VABackbone',
        trunk=trunk,
        layout=layout,
        init_cfg=WEIGHTS,
    )
    backbone = method_config(given, 'lora').model.backbone
    assert (backbone.init_cfg, backbone.layout) == (WEIGHTS, layout)


@pytest.mark.parametrize('kind', ['mmdet.SwinTransformer', 'mmseg.BEiT'])
@pytest.mark.parametrize('method', ['e3va', 'lora'])
def test_weights_outside_a_trunk_are_kept_with_it(kind, method):
    given = config(
        type='e3va_mm.PETLBackbone',
        trunk=dict(type=kind),
        method=dict(type='e3va_mm.Mona'),
        init_cfg=WEIGHTS,
    )
    backbone = method_config(given, method).model.backbone
    assert backbone.init_cfg == WEIGHTS


def test_the_side_path_is_exact_with_its_own_size():
    given = config(
        type='e3va_mm.E3VASwinTransformer',
        side_path=dict(preset='lean', rank=4, trunk_drop_path=0.1),
        **TINY,
    )
    side_path = method_config(given, 'e3va').model.backbone.side_path
    paper = 'e3va_mm.E3VASidePath'
    assert side_path == dict(type=paper, preset='exact', rank=4)


def test_a_rival_becomes_any_other_method():
    given = config(type='mmdet.SwinTransformer', init_cfg=WEIGHTS, **TINY)
    lora = method_config(given, 'lora')
    for method in ('mona', 'e3va'):
        direct, over = (
            method_config(c, method).model.backbone for c in (given, lora)
        )
        for backbone in (direct, over):
            backbone.pop('allow_random_trunk', None)
        assert over == direct


def test_a_side_path_of_another_kind_does_not_stay():
    mix = dict(type='e3va_mm.E3VAMixSidePath', width=8, taps=['ffn'], rank=8)
    given = config(type='e3va_mm.E3VASwinTransformer', side_path=mix, **TINY)
    paper = method_config(given, 'e3va').model.backbone.side_path
    assert paper.type == 'e3va_mm.E3VASidePath'
    assert not {'width', 'taps'} & set(paper) and paper.rank == 8
    same = method_config(given, 'e3va-mix').model.backbone.side_path
    assert (same.width, same.taps) == (8, ['ffn'])


def test_an_unknown_method_is_refused():
    given = config(type='mmdet.SwinTransformer', **TINY)
    with pytest.raises(ConfigError, match=r"full, fixed.*but got 'none'"):
        method_config(given, 'none')


@every_digits
def test_a_run_validates_once_at_the_end(path):
    given = Config.fromfile(path)
    run = run_config(given, 3e-4, 2)
    length = run.get('epochs') or run.iterations
    assert run.train_cfg.val_interval == length
    checkpoint = run.default_hooks.checkpoint
    whole = given.default_hooks.checkpoint
    assert checkpoint.get('interval') == whole.get('interval')
    assert (checkpoint.max_keep_ckpts, checkpoint.save_best) == (1, None)
    assert run.optim_wrapper.optimizer.lr == 3e-4
    assert run.randomness == dict(seed=2)
    for split in ('train', 'val', 'test'):
        loader = run[f'{split}_dataloader']
        assert (loader.num_workers, loader.persistent_workers) == (0, False)
    assert run.model == given.model
    assert given.optim_wrapper.optimizer.lr != 3e-4
