"""Arguments of stock backbones: taken over, without effect, or refused."""

import pytest

from e3va_mm.backbones import stock
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import build_e3va
from tests.trunk_cases import VIT, need

CONVNEXT = dict(type='mmpretrain.ConvNeXt', arch='atto')
FILE = dict(type='Pretrained', checkpoint='a.pth')


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(
        stock, 'print_log', lambda message, **_: found.append(message)
    )
    return found


@pytest.mark.parametrize(
    'kind, ignored',
    [
        (
            'E3VA',
            'drop_rate, attn_drop_rate, drop_path_rate, with_cp, '
            'frozen_stages',
        ),
        ('Full', 'frozen_stages'),
    ],
)
def test_arguments_without_effect_are_said_in_one_line(kind, ignored, lines):
    ours = build_e3va(
        drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.3,
        frozen_stages=2,
        with_cp=True,
        convert_weights=True,
        tuner=dict(type=kind),
    )
    assert lines == [
        f'{ignored}: without effect on the trunk SwinTransformer, of which '
        'the tuner says what trains.'
    ]
    # Stock freezing must not reach what trains.
    assert ours.train().norm0.weight.requires_grad
    last = ours.stages[3].blocks[0].ffn.dropout_layer
    assert (getattr(last, 'drop_prob', 0) > 0) == (kind == 'Full')


def test_the_same_of_a_vit(lines):
    need(dict(type='mmpretrain.VisionTransformer'))
    vit = dict(type='e3va_mm.E3VAVisionTransformer', arch=VIT, img_size=64)
    vit |= dict(trunk_type='mmpretrain.VisionTransformer')
    ours = MODELS.build(dict(vit, drop_path_rate=0.3, frozen_stages=2))
    assert len(lines) == 1
    assert lines[0].startswith('drop_path_rate, frozen_stages: without effect')
    assert ours.layers[3].ffn.dropout_layer.drop_prob == 0
    ours = MODELS.build(dict(vit, tuner=dict(trunk_drop_path=0.5))).train()
    assert ours.layers[3].ffn.dropout_layer.drop_prob == 0.5
    assert ours.layers[3].ffn.dropout_layer.training
    assert not ours.layers[3].attn.training


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(depth=3), r'`depth` is no argument of mmdet.*It takes .*depths'),
        (dict(depths=(2, 0)), '`depths` should hold a whole number above'),
        (dict(embed_dims=True), '`embed_dims` should be a number, but is Tru'),
        (dict(mlp_ratio=float('nan')), '`mlp_ratio` should be a number'),
        (dict(embed_dims=-3), 'refuses its arguments: .* embed_dims=-3'),
        (dict(pretrained=''), '`pretrained` of the backbone should be a path'),
        (dict(pretrained='a.pth', init_cfg=FILE), 'are both set; keep `init_'),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_e3va(**arguments)


def test_pretrained_is_deprecated():
    with pytest.warns(DeprecationWarning, match='use `init_cfg`'):
        ours = build_e3va(pretrained='a.pth')
    assert ours.init_cfg == FILE


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(trunk='ConvNeXt'), '`backbone.trunk` should be the config of'),
        (dict(trunk={}), '`backbone.trunk` should be the config of'),
        (dict(trunk=dict(type='Convnext')), "There is no backbone 'Convnext'"),
        (dict(trunk=dict(CONVNEXT, depth=3)), '`depth` is no argument of'),
        (dict(trunk=dict(CONVNEXT, out_indices=[4])), 'some of its 4 stages'),
        (
            dict(trunk=dict(CONVNEXT, init_cfg=FILE), init_cfg=FILE),
            'is set in `backbone` and in `backbone.trunk`',
        ),
        (
            dict(
                trunk=dict(type='mmdet.ResNet', depth=18),
                tuner=dict(trunk_drop_path=0.1),
            ),
            'ResNet has no `drop_path_rate`. Leave it out.',
        ),
        (
            dict(
                trunk=dict(
                    type='mmpretrain.TIMMBackbone', model_name='convnext_atto'
                )
            ),
            '`features_only=True`',
        ),
    ],
)
def test_impossible_trunks_are_refused(kwargs, message):
    need(CONVNEXT)
    if 'TIMM' in str(kwargs):
        pytest.importorskip('timm')
    with pytest.raises(ConfigError, match=message):
        MODELS.build(dict(type='e3va_mm.E3VABackbone', **kwargs))
