import copy

import pytest
import torch
from mmdet.models import CascadeRCNN, ResNet, SwinTransformer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from e3va_mm.errors import ConfigError
from e3va_mm.measure import VARIANTS, variant_config
from e3va_mm.measure.variants import prepare_variant
from e3va_mm.models import E3VASwinTransformer
from e3va_mm.utils import count_parameters
from tests.helpers import TINY, randomised
from tests.test_configs import CONFIGS

DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'
OURS = 'e3va_mm.E3VASwinTransformer'
NOTHING = dict(type='e3va_mm.NoSidePath', train_output_norms=False)


def config(scope='mmdet', **backbone):
    model = dict(type='Any', backbone=dict(TINY, **backbone))
    return Config(dict(default_scope=scope, model=model))


def ours(scope='mmdet', **side_path):
    return config(scope, type=OURS, side_path=side_path)


def build(changed, variant):
    with DefaultScope.overwrite_default_scope(changed.default_scope):
        backbone = MODELS.build(changed.model.backbone)
    model = torch.nn.Module()
    model.backbone = backbone
    prepare_variant(model.train(), variant)
    return backbone


def test_full_is_the_stock_backbone_and_nothing_else_differs():
    config = Config.fromfile(DIGITS)
    config.model.backbone.side_path = dict(rank=8)
    full = variant_config(config, 'full')
    assert full.model.backbone.type == 'mmdet.SwinTransformer'
    assert 'side_path' not in full.model.backbone
    assert 'allow_random_trunk' not in full.model.backbone
    for other in (full, variant_config(config, 'as-is')):
        other.model.pop('backbone')
        rest = config.model.to_dict()
        rest.pop('backbone')
        assert other.model.to_dict() == rest
    assert config.model.backbone.init_cfg, 'the original is left alone'


def test_nothing_is_downloaded():
    given = config(type=OURS, init_cfg=dict(type='Pretrained', checkpoint='x'))
    given.model.pretrained = 'y'
    given.model.heads = [dict(head=dict(init_cfg=['z'], other=1))]
    given.model.teacher = dict(backbone=dict(type=OURS))
    model = variant_config(given, 'as-is').model
    assert model.heads == [dict(head=dict(other=1))]
    assert model.backbone == dict(TINY, type=OURS, allow_random_trunk=True)
    assert model.teacher.backbone.allow_random_trunk
    assert 'pretrained' not in model


@pytest.mark.parametrize(
    'variant, expected',
    [
        ('exact', dict(preset='exact', rank=4)),
        ('lean', dict(preset='lean', rank=4)),
        ('frozen-same', dict(NOTHING, preset='lean', trunk_chunk=7)),
        ('frozen-lean', dict(NOTHING, preset='lean')),
    ],
)
def test_a_side_path_keeps_what_its_variant_does_not_decide(variant, expected):
    given = ours(
        preset='lean', rank=4, save_taps='bf16', compute='fp16', trunk_chunk=7
    )
    backbone = variant_config(given, variant).model.backbone
    assert backbone.type == OURS
    assert backbone.side_path.to_dict() == expected
    plain = variant_config(ours(), variant).model.backbone.side_path
    expected = {
        k: v for k, v in expected.items() if k not in ('rank', 'trunk_chunk')
    }
    if variant == 'frozen-same':
        expected.pop('preset')
    assert plain.to_dict() == expected


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_builds_from_ours_and_from_stock(scope, variant):
    """What trains in it, and that all begin as the same backbone."""
    stock_trains = {
        'as-is': 1.0,
        'full': 1.0,
        **dict.fromkeys(('frozen', 'frozen-same', 'frozen-lean'), 0.0),
    }
    image = torch.randn(1, 3, 64, 64)
    for given in (
        ours(scope, rank=4, trunk_chunk=100),
        config(scope, type='SwinTransformer', frozen_stages=2),
    ):
        changed = variant_config(given, variant)
        backbone = build(changed, variant)
        total, trains = count_parameters(backbone)
        is_ours = isinstance(backbone, E3VASwinTransformer)
        assert is_ours == (changed.model.backbone.type == OURS)
        if variant == 'as-is' and given.model.backbone.type != OURS:
            assert 0 < trains < total, 'frozen_stages of the config'
        elif variant in stock_trains and not (variant == 'as-is' and is_ours):
            assert trains == stock_trains[variant] * total
        else:
            assert 0 < trains < 0.6 * total
        outputs = backbone(image)
        assert [o.shape[1] for o in outputs] == [32, 64, 128, 256]
        assert any(o.requires_grad for o in outputs) == (trains > 0)


def test_frozen_is_in_eval_mode_and_lora_follows_the_model():
    given = config(type='SwinTransformer', drop_path_rate=0.3)
    frozen = build(variant_config(given, 'frozen'), 'frozen')
    assert not any(module.training for module in frozen.modules())
    lora = build(variant_config(given, 'lora'), 'lora')
    assert all(module.training for module in lora.modules())


def test_frozen_and_frozen_same_compute_the_same():
    given = ours(trunk_compute='fp32')
    image = torch.randn(1, 3, 60, 92)
    frozen, same = (
        build(variant_config(given, v), v) for v in ('frozen', 'frozen-same')
    )
    same.load_state_dict(randomised(frozen).state_dict())
    for a, b in zip(frozen(image), same(image), strict=True):
        torch.testing.assert_close(a, b)


def test_stock_classes_of_another_scope_and_of_new_style_configs():
    for kind in ('mmseg.SwinTransformer', SwinTransformer):
        changed = variant_config(config(type=kind), 'lean')
        assert changed.model.backbone.type == OURS
    new = ours()
    new.default_scope, new.model.type = None, CascadeRCNN
    new.model.backbone.type = E3VASwinTransformer
    full = variant_config(new, 'full').model.backbone
    assert full.type == 'mmdet.SwinTransformer'
    assert variant_config(new, 'as-is').model.backbone.allow_random_trunk


@pytest.mark.parametrize('kind', ['ResNet', 'mmdet.ResNet', ResNet])
def test_other_backbones_have_the_generic_variants(kind):
    given = config(type=kind, depth=18, frozen_stages=1)
    for key in TINY:
        given.model.backbone.pop(key)
    full = build(variant_config(given, 'full'), 'full')
    assert all(p.requires_grad for p in full.parameters())
    frozen = build(variant_config(given, 'frozen'), 'frozen')
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(
        ConfigError,
        match="their families, but got 'mmdet.ResNet'. Other "
        'backbones have the variants as-is, full, frozen.',
    ):
        variant_config(given, 'lora')


@pytest.mark.parametrize(
    'stock, kind',
    [
        (dict(type='mmdet.PyramidVisionTransformerV2'), 'E3VABackbone'),
        (
            dict(type='mmseg.VisionTransformer', frozen_stages=1),
            'E3VAVisionTransformer',
        ),
        (dict(type='mmpretrain.TIMMBackbone', model_name='x'), 'E3VABackbone'),
    ],
)
def test_any_known_family_has_all_variants(stock, kind):
    """There and back again, whichever of the two a config has."""
    given = Config(
        dict(model=dict(type='Any', backbone=stock), default_scope='mmdet')
    )
    lean = variant_config(given, 'lean').model.backbone
    assert lean.type == f'e3va_mm.{kind}'
    assert lean.side_path == dict(preset='lean')
    assert lean.allow_random_trunk
    ours = Config(
        dict(model=dict(type='Any', backbone=lean), default_scope='mmdet')
    )
    full = variant_config(ours, 'full').model.backbone
    expected = dict(stock)
    if 'frozen_stages' in stock:
        expected['frozen_stages'] = -1
    assert full.to_dict() == expected
    nothing = variant_config(ours, 'frozen-lean').model.backbone.side_path
    assert nothing.type == 'e3va_mm.NoSidePath'


def test_the_stock_vit_gives_what_ours_gives():
    ours = Config(
        dict(
            model=dict(
                type='Any',
                backbone=dict(type='e3va_mm.E3VAVisionTransformer', arch='b'),
            ),
            default_scope='mmdet',
        )
    )
    assert variant_config(ours, 'full').model.backbone == dict(
        type='mmpretrain.VisionTransformer', arch='b', out_type='featmap'
    )


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match=r"frozen,.* lora, but got 'lo'\."):
        variant_config(ours(), 'lo')
    given = ours()
    given.model.student = given.model.pop('backbone')
    assert variant_config(given, 'as-is').model.student.allow_random_trunk
    with pytest.raises(ConfigError, match='Any has the keys type, student'):
        variant_config(given, 'full')
    with pytest.raises(ConfigError, match='but it has the keys data'):
        variant_config(Config(dict(data=1)), 'as-is')


def test_the_original_is_left_alone():
    given = ours(preset='lean', trunk_chunk=7)
    before = copy.deepcopy(given.to_dict())
    for variant in VARIANTS:
        variant_config(given, variant)
    assert given.to_dict() == before
