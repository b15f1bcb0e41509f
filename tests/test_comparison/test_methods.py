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
from e3va_mm.measure.variants import ON_PLAIN
from e3va_mm.registry import MODELS
from tests.helpers import TINY
from tests.test_configs import CONFIGS

ALL = (*METHODS, *SIDE_PATHS)
DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'
SWIN = 'e3va_mm.E3VASwinTransformer'
WEIGHTS = dict(type='Pretrained', checkpoint='weights.pth')


def config(scope='mmdet', **backbone):
    model = dict(type='Any', backbone=backbone)
    return Config(dict(default_scope=scope, model=model))


def backbone_of(given, method):
    return method_config(given, method).model.backbone


def test_methods_differ_in_the_tuner_alone():
    given = Config.fromfile(DIGITS)
    before = copy.deepcopy(given.to_dict())
    rests = []
    for method in ALL:
        changed = method_config(given, method).to_dict()
        backbone = changed['model']['backbone']
        expected = METHODS.get(method) or SIDE_PATHS[method]
        found = backbone.pop('tuner')
        assert {k: found[k] for k in expected} == expected, method
        assert (backbone['type'], backbone['drop_path_rate']) == (SWIN, 0)
        assert backbone['init_cfg'] == given.model.backbone.init_cfg
        rests.append(changed)
    assert all(rest == rests[0] for rest in rests)
    assert given.to_dict() == before, 'the original is left alone'


@pytest.mark.parametrize(
    'method, expected',
    [
        ('mona:last=4', dict(type='Mona', last=4)),
        ('partial1:blocks=2', dict(type='Partial', blocks=2)),
        ("lora:last=2:parts=('q',)", dict(type='LoRA', last=2, parts=('q',))),
        (
            'e3va:save_taps=bf16',
            dict(type='E3VA', preset='exact', rank=4, save_taps='bf16'),
        ),
    ],
)
def test_options_follow_the_name_of_a_method(method, expected):
    given = config(type=SWIN, side_path=dict(rank=4), **TINY)
    assert backbone_of(given, method).tuner.to_dict() == expected


@pytest.mark.parametrize(
    'method, message',
    [
        ('mona:last', 'as in mona:OPTION=VALUE, but got .last. in'),
        ('mona:lats=4', '`tuner.lats` is unknown'),
        ('mona:last=no', '`tuner.last` should be a whole number'),
        ('e3va:save_taps=int5', '`tuner.save_taps` should be one of'),
    ],
)
def test_options_of_no_method_are_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        backbone_of(config(type=SWIN, **TINY), method)


@pytest.mark.parametrize('method', [m for m in ALL if m not in ON_PLAIN])
def test_every_method_builds(method):
    changed = method_config(config(type='SwinTransformer', **TINY), method)
    with DefaultScope.overwrite_default_scope(changed.default_scope):
        backbone = MODELS.build(changed.model.backbone)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in backbone.parameters())
    assert (trained == 0) == (method == 'fixed')
    assert (trained == whole) == (method == 'full')


def test_features_on_disk_are_for_those_that_can_read_them():
    given = config(type=SWIN, trunk_cache=dict(dir='x'), **TINY)
    hooks = [dict(type='e3va_mm.TrunkCacheHook'), dict(type='EMAHook')]
    given.custom_hooks = hooks
    for method, tuner in (('e3va', 'E3VA'), ('fixed', 'NoSidePath')):
        found = method_config(given, method)
        assert found.model.backbone.tuner.type == tuner
        assert found.model.backbone.trunk_cache == dict(dir='x')
        assert found.custom_hooks == hooks
    for method in ('lora', 'full'):
        found = method_config(given, method)
        assert 'trunk_cache' not in found.model.backbone
        assert found.custom_hooks == hooks[1:]


def test_other_families_are_a_trunk():
    stock = dict(type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.4)
    for method in ('adapter', 'e3va'):
        found = backbone_of(config(**stock, init_cfg=WEIGHTS), method)
        assert found.type == 'e3va_mm.E3VABackbone'
        assert found.trunk == dict(stock, drop_path_rate=0, init_cfg=WEIGHTS)
    layout = dict(blocks='stages')
    given = config(
        type='e3va_mm.PETLBackbone',
        trunk=dict(type='mmdet.ResNet', depth=18),
        method=dict(type='e3va_mm.Mona'),
        layout=layout,
        init_cfg=WEIGHTS,
    )
    found = backbone_of(given, 'lora')
    assert (found.init_cfg, found.layout) == (WEIGHTS, layout)
    assert found.trunk == dict(type='mmdet.ResNet', depth=18)


def test_a_side_path_is_exact_with_its_own_size():
    options = dict(preset='lean', rank=4, trunk_drop_path=0.1)
    given = config(type=SWIN, side_path=options, **TINY)
    expected = dict(type='E3VA', preset='exact', rank=4)
    assert backbone_of(given, 'e3va').tuner == expected


def test_any_method_becomes_any_other():
    given = config(type='mmdet.SwinTransformer', init_cfg=WEIGHTS, **TINY)
    lora = method_config(given, 'lora')
    for method in ('mona', 'e3va'):
        assert backbone_of(lora, method) == backbone_of(given, method)


def test_options_of_another_kind_of_side_path_are_dropped():
    mix = dict(type='e3va_mm.E3VAMixSidePath', width=8, taps=['ffn'], rank=8)
    given = config(type=SWIN, side_path=mix, **TINY)
    paper = backbone_of(given, 'e3va').tuner
    assert paper == dict(type='E3VA', preset='exact', rank=8)
    same = backbone_of(given, 'e3va-mix').tuner
    assert (same.width, same.taps) == (8, ['ffn'])


def test_an_unknown_method_is_refused():
    given = config(type='mmdet.SwinTransformer', **TINY)
    with pytest.raises(ConfigError, match=r"full, fixed.*but got 'none'"):
        method_config(given, 'none')


@pytest.mark.parametrize('name', ['cascade', 'upernet'])
def test_a_run_validates_once_at_the_end(name):
    given = Config.fromfile(CONFIGS / f'{name}_e3va_swin_nano_digits.py')
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
    given.pop('test_dataloader')
    assert 'test_dataloader' not in run_config(given, 3e-4, 2)
    assert given.optim_wrapper.optimizer.lr != 3e-4
