"""Plain ViTs over the stock classes of mmpretrain and mmsegmentation."""

import copy

import pytest
import torch
from mmengine.registry import DefaultScope

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.utils import count_parameters
from tests.trunk_cases import VIT, VITS, build_stock, flat, need

pytest.importorskip('mmpretrain')
SMALL = dict(arch=VIT, img_size=64, patch_size=16, layer_scale_init_value=0.1)


def build(scope='mmdet', **kwargs):
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(
            {
                'type': 'e3va_mm.E3VAVisionTransformer',
                'allow_random_trunk': True,
                **kwargs,
            }
        )


@pytest.mark.parametrize('name', VITS)
def test_every_class_with_its_arguments_flat(name):
    config = copy.deepcopy(VITS[name])
    need(config)
    ours = build(
        trunk_type=config.pop('type'), side_path=dict(rank=4), **config
    )
    assert type(ours.trunk.stock).__name__ == VITS[name]['type'].split('.')[1]
    assert [*ours.out_indices] == [1, 3] or ours.out_indices == (3,)
    stock = build_stock(name)
    ours.init_weights()
    ours.load_state_dict(stock.state_dict(), strict=False)


@pytest.mark.parametrize(
    'scope, stock, outputs',
    [
        ('mmdet', 'mmpretrain', 'featmap'),
        ('mmpretrain', 'mmpretrain', 'cls_token'),
    ],
)
def test_defaults_follow_the_framework(scope, stock, outputs):
    ours = build(scope, **SMALL)
    module = type(ours.trunk.stock).__module__
    assert module.startswith(f'{stock}.models.backbones.vision_transformer')
    assert ours.trunk.stock.out_type == outputs


def test_mmseg_takes_its_own():
    ours = build('mmseg', embed_dims=32, num_layers=2, num_heads=2)
    assert type(ours.trunk.stock).__module__ == 'mmseg.models.backbones.vit'
    assert ours.out_indices == (1,)


@pytest.mark.parametrize(
    'arguments, blocks, width',
    [
        (dict(arch='base'), 12, 768),
        (dict(arch='large'), 24, 1024),
        (
            dict(arch='dinov2-g', layer_cfgs=dict(ffn_type='swiglu_fused')),
            40,
            1536,
        ),
    ],
    ids='BLg',
)
def test_pinned_counts(arguments, blocks, width):
    """Two adapters a block, as on Swin, and the final norm."""
    with torch.device('meta'):
        ours = build(img_size=518, patch_size=14, **arguments)
    pinned = {12: 913_920, 24: 2_435_072, 40: 6_085_632}[blocks]
    assert count_parameters(ours)[1] == pinned
    half, rank = width // 2, 16
    adapter = 2 * rank * (width + half) + half + width
    assert pinned == 2 * blocks * adapter + 2 * width


@pytest.mark.parametrize('size', [(64, 64), (80, 48), (70, 100), (16, 16)])
@pytest.mark.parametrize(
    'name', ['vit', 'dinov2-g', 'eva02', 'sam', 'mmseg vit']
)
def test_any_size_that_the_stock_class_takes(name, size):
    config = copy.deepcopy(VITS[name])
    ours = build(
        trunk_type=config.pop('type'), side_path=dict(rank=4), **config
    )
    stock = build_stock(name)
    ours.init_weights()
    ours.load_state_dict(stock.state_dict(), strict=False)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for one, other in zip(
            flat(ours(image)), flat(stock(image)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Rotary embeddings are buffers; the stock class changes them.
    assert {k: v.shape for k, v in ours.trunk.stock.named_buffers()} == {
        k: v.shape for k, v in build_stock(name).named_buffers()
    }


def test_queries_in_parts_are_the_whole(monkeypatch):
    from e3va_mm.trunks.kernels import attention

    for name in ('beit', 'beit, shared bias', 'sam'):
        config = copy.deepcopy(VITS[name])
        ours = build(
            trunk_type=config.pop('type'), side_path=dict(rank=4), **config
        )
        stock = build_stock(name)
        ours.load_state_dict(stock.state_dict(), strict=False)
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            whole = flat(ours(image))
            # Five queries at a time, or one in windows.
            monkeypatch.setattr(attention, 'BIAS_VALUES', 4 * 17 * 5)
            parts = flat(ours(image))
        monkeypatch.undo()
        for one, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_past_the_last_output_is_built():
    ours = build(out_indices=[1], **SMALL)
    assert len(ours.layers) == 2 and not hasattr(ours, 'ln1')
    assert not any('layers.3' in key for key in ours.state_dict())
    whole = MODELS.build(dict(type='mmpretrain.VisionTransformer', **SMALL))
    ours.load_state_dict(whole.state_dict(), strict=False)


# -- files -------------------------------------------------------------------


def timm_dinov2(**kwargs):
    timm = pytest.importorskip('timm')
    return timm.models.vision_transformer.VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        init_values=0.5,
        num_classes=0,
        **kwargs,
    ).eval()


@pytest.mark.parametrize('extra', [{}, {'mask_token': torch.zeros(1, 32)}])
def test_an_official_file_gives_the_official_features(tmp_path, extra):
    theirs = timm_dinov2()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / 'dinov2.pth'
    torch.save({**theirs.state_dict(), **extra}, path)
    ours = build(
        out_indices=[1, 3],
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
        **SMALL,
    )
    ours.init_weights()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = ours(image)
        expected = theirs.get_intermediate_layers(
            image, n=[1, 3], reshape=True
        )
        last = theirs.get_intermediate_layers(
            image, n=[3], reshape=True, norm=True
        )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], last[0], rtol=1e-4, atol=1e-5)


def test_positions_are_resized_as_by_the_stock_class(tmp_path):
    small = MODELS.build(
        dict(type='mmpretrain.VisionTransformer', **dict(SMALL, img_size=48))
    )
    small.init_weights()
    path = tmp_path / 'small.pth'
    torch.save(small.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    stock = MODELS.build(
        dict(
            type='mmpretrain.VisionTransformer',
            **dict(SMALL, out_type='featmap'),
            init_cfg=init_cfg,
        )
    )
    stock.init_weights()
    ours = build(init_cfg=init_cfg, **SMALL)
    ours.init_weights()
    assert torch.equal(ours.pos_embed, stock.pos_embed)


def test_mmseg_positions_are_resized_as_by_the_stock_class(tmp_path):
    arguments = dict(embed_dims=32, num_layers=2, num_heads=2, img_size=64)
    small = MODELS.build(
        dict(
            type='mmseg.VisionTransformer',
            **dict(arguments, img_size=(48, 48)),
        )
    )
    small.init_weights()
    path = tmp_path / 'small.pth'
    torch.save(small.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    stock = MODELS.build(
        dict(type='mmseg.VisionTransformer', **arguments, init_cfg=init_cfg)
    )
    stock.init_weights()
    ours = build('mmseg', init_cfg=init_cfg, **arguments)
    ours.init_weights()
    torch.testing.assert_close(ours.pos_embed, stock.pos_embed)


def test_mae_weights_in_the_class_that_has_more():
    """Files of MAE have neither layer scales nor relative positions."""
    arguments = dict(
        embed_dims=32, num_layers=2, num_heads=2, img_size=64, init_values=0.1
    )
    ours = build('mmseg', trunk_type='mmseg.MAE', **arguments)
    file = {
        key: value
        for key, value in ours.state_dict().items()
        if not key.startswith('side_path.')
        and 'gamma' not in key
        and 'relative' not in key
    }
    ours.load_state_dict(file, strict=False)
    state = ours.state_dict()
    assert all((v == 1).all() for k, v in state.items() if 'gamma' in k)
    assert not any(v.any() for k, v in state.items() if 'bias_table' in k)


def test_another_variant_is_named():
    ours = build(**SMALL)
    other = MODELS.build(
        dict(
            type='mmpretrain.VisionTransformer',
            **dict(SMALL, arch=dict(VIT, num_layers=6)),
        )
    )
    with pytest.raises(CheckpointError) as error:
        ours.load_state_dict(other.state_dict(), strict=False)
    assert 'num_layers=6' in str(error.value)
    assert 'the config asks for' in str(error.value)


# -- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(arch=VIT, depths=3), '`depths` is no argument of mmpretrain'),
        (dict(arch='gigantic'), 'refuses its arguments: Arch gigantic'),
        (dict(SMALL, out_indices=[4]), 'some of its 4 blocks, .*got \\(4,\\)'),
        (
            dict(trunk_type='mmpretrain.NoSuchViT'),
            "no backbone 'mmpretrain.NoSuchViT'",
        ),
        (
            dict(trunk_type='mmseg.VisionTransformer', out_origin=True),
            '`out_origin=True` asks for the embedding',
        ),
        (dict(SMALL, side_path=dict(taps=['mlp'])), 'side_path.taps'),
    ],
)
def test_impossible_arguments(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        build(**kwargs)


def test_arguments_without_effect_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(
        'e3va_mm.backbones.stock_arguments.print_log',
        lambda message, **_: said.append(message),
    )
    ours = build(drop_path_rate=0.3, frozen_stages=2, **SMALL)
    assert said == [
        'drop_path_rate, frozen_stages: without effect on the frozen trunk '
        'of E3VAVisionTransformer.'
    ]
    assert ours.layers[3].ffn.dropout_layer.drop_prob == 0


def test_trunk_drop_path_is_asked_for_expressly():
    ours = build(side_path=dict(trunk_drop_path=0.5), **SMALL)
    ours.train()
    assert ours.layers[3].ffn.dropout_layer.drop_prob == 0.5
    assert ours.layers[3].ffn.dropout_layer.training
    assert not ours.layers[3].attn.training
