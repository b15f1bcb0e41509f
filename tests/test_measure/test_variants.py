import copy

import pytest
import torch
from mmdet.models import CascadeRCNN, ResNet, SwinTransformer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from e3va_mm.errors import ConfigError
from e3va_mm.measure import VARIANTS, variant_config
from e3va_mm.measure.variants import ON_PLAIN, prepare_variant
from e3va_mm.models import E3VASwinTransformer
from e3va_mm.utils import count_parameters
from tests.helpers import TINY

OURS = 'e3va_mm.E3VASwinTransformer'
NOTHING = dict(type='NoSidePath', train_output_norms=False)


def config(scope='mmdet', **backbone):
    model = dict(type='Any', backbone=backbone)
    return Config(dict(default_scope=scope, model=model))


def ours(scope='mmdet', **tuner):
    return config(scope, type=OURS, tuner=tuner, **TINY)


def build(config, variant):
    changed = variant_config(config, variant)
    model = torch.nn.Module()
    with DefaultScope.overwrite_default_scope(changed.default_scope):
        model.backbone = MODELS.build(changed.model.backbone)
    prepare_variant(model.train(), variant)
    return model.backbone


def test_nothing_is_downloaded_and_the_original_is_left_alone():
    config = ours()
    model = config.model
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint='x')
    model.pretrained = 'y'
    model.heads = [dict(head=dict(init_cfg=['z'], other=1))]
    model.teacher = dict(backbone=dict(type=OURS))
    before = copy.deepcopy(config.to_dict())
    found = variant_config(config, 'as-is').model
    assert found.heads == [dict(head=dict(other=1))]
    assert 'init_cfg' not in found.backbone and 'pretrained' not in found
    assert found.backbone.allow_random_trunk
    assert found.teacher.backbone.allow_random_trunk
    for variant in VARIANTS:
        variant_config(config, variant)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    'variant, expected',
    [
        ('exact', dict(type='E3VA', preset='exact', rank=4)),
        ('lean', dict(type='E3VA', preset='lean', rank=4)),
        ('frozen-same', dict(NOTHING, preset='lean', trunk_chunk=7)),
        ('frozen-lean', dict(NOTHING, preset='lean')),
        ('lora', dict(type='LoRA')),
        ('full', dict(type='Full')),
    ],
)
def test_a_tuner_keeps_what_its_variant_does_not_decide(variant, expected):
    options = dict(
        preset='lean', rank=4, save_taps='bf16', compute='fp16', trunk_chunk=7
    )
    for key in ('tuner', 'side_path'):
        given = config(type=OURS, **{key: options}, **TINY)
        backbone = variant_config(given, variant).model.backbone
        assert backbone.type == OURS
        assert backbone.tuner.to_dict() == expected
        assert 'side_path' not in backbone


@pytest.mark.parametrize(
    'kind', ['E3VAMix', 'E3VAFusion', 'LST', 'NoSidePath']
)
def test_the_trunk_of_any_side_path_is_that_of_frozen_same(kind):
    given = ours(type=kind, preset='lean', trunk_chunk=7)
    found = variant_config(given, 'frozen-same').model.backbone.tuner
    assert found.to_dict() == dict(NOTHING, preset='lean', trunk_chunk=7)


@pytest.mark.parametrize(
    'before, variant, expected',
    [
        (dict(rank=8, bottleneck_ratio=0.25), 'e3va-fusion', {}),
        (dict(type='E3VAFusion', rank=8), 'e3va', {}),
        (dict(type='E3VAFusion', rank=8), 'e3va-fusion', dict(rank=8)),
        (dict(type='E3VAMix', mix_every=4, rank=8), 'e3va', dict(rank=8)),
        (dict(rank=[4, 8], taps=('ffn',)), 'e3va-mix', dict(rank=[4, 8])),
        (dict(type='LST', reduction=4), 'lst', dict(reduction=4)),
        (dict(type='LST', reduction=4), 'e3va', {}),
        (NOTHING, 'e3va', {}),
    ],
)
def test_a_side_path_keeps_what_means_the_same(before, variant, expected):
    tuner = variant_config(ours(**before), variant).model.backbone.tuner
    assert tuner.pop('preset') == 'exact' and tuner.pop('type')
    assert tuner.to_dict() == expected


def test_a_tuner_inside_leaves_nothing_to_a_side_path():
    given = config(
        type='e3va_mm.PETLSwinTransformer',
        method=dict(type='e3va_mm.LoRA', rank=2),
        **TINY,
    )
    found = variant_config(given, 'exact').model.backbone
    assert found.tuner == dict(type='E3VA', preset='exact')


@pytest.mark.parametrize('variant', [v for v in VARIANTS if v not in ON_PLAIN])
def test_every_variant_builds_from_ours_and_from_stock(variant):
    image = torch.randn(1, 3, 64, 64)
    stock = config('mmseg', type='SwinTransformer', frozen_stages=2, **TINY)
    for given in (ours(rank=4, trunk_chunk=100), stock):
        backbone = build(given, variant)
        total, trains = count_parameters(backbone)
        if variant == 'full':
            assert trains == total
        elif variant.startswith('frozen'):
            assert trains == 0
        elif variant != 'as-is':
            assert 0 < trains < 0.75 * total
        outputs = backbone(image)
        assert [o.shape[1] for o in outputs] == [32, 64, 128, 256]
        assert any(o.requires_grad for o in outputs) == (trains > 0)
        if variant == 'frozen':
            assert not any(module.training for module in backbone.modules())


def test_classes_in_place_of_names():
    given = config(type=SwinTransformer, **TINY)
    assert variant_config(given, 'lean').model.backbone.type == OURS
    new = ours()
    new.default_scope, new.model.type = None, CascadeRCNN
    new.model.backbone.type = E3VASwinTransformer
    full = variant_config(new, 'full').model.backbone
    assert full.type == OURS and full.tuner.type == 'Full'
    assert variant_config(new, 'as-is').model.backbone.allow_random_trunk


@pytest.mark.parametrize('kind', ['mmdet.ResNet', ResNet])
def test_any_other_backbone_can_be_full_and_frozen(kind):
    given = config(type=kind, depth=18, frozen_stages=1)
    assert all(p.requires_grad for p in build(given, 'full').parameters())
    frozen = build(given, 'frozen')
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ConfigError, match='ResNet is of no known family'):
        build(given, 'lora')


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match=r"frozen,.* lora,.* but got 'lo'\."):
        variant_config(ours(), 'lo')
    given = ours()
    given.model.student = given.model.pop('backbone')
    assert variant_config(given, 'as-is').model.student.allow_random_trunk
    with pytest.raises(ConfigError, match='Any has the keys type, student'):
        variant_config(given, 'full')
    with pytest.raises(ConfigError, match='but it has the keys data'):
        variant_config(Config(dict(data=1)), 'as-is')
