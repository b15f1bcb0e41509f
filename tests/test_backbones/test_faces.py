"""The names of tuned backbones in configs, and the one key for tuners."""

import copy
import importlib.util

import pytest
import torch
from mmengine import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import nn

from e3va_mm.backbones import TunedBackbone, tuned_config
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.tuners import E3VA, LoRA, Mona
from e3va_mm.utils import count_parameters
from tests.helpers import TINY, build_e3va
from tests.trunk_cases import CASES, VIT, VITS, awake, need


def build(kind, **kwargs):
    kind = dict(type=f'e3va_mm.{kind}', allow_random_trunk=True)
    return MODELS.build({**kind, **kwargs})


def keys(backbone):
    return [(k, tuple(v.shape)) for k, v in backbone.state_dict().items()]


# -- the tuner ---------------------------------------------------------------


@pytest.mark.parametrize(
    'kind', ['E3VASwinTransformer', 'PETLSwinTransformer']
)
@pytest.mark.parametrize(
    'tuner, child, found',
    [
        (dict(), 'side_path', E3VA),
        (dict(rank=4), 'side_path', E3VA),
        (dict(type='E3VA', rank=4), 'side_path', E3VA),
        (dict(type='e3va_mm.E3VASidePath'), 'side_path', E3VA),
        (dict(type='LoRA', rank=4), 'petl', LoRA),
        (dict(type='e3va_mm.LoRA', rank=4), 'petl', LoRA),
        (ConfigDict(type='Mona', bottleneck=4), 'petl', Mona),
        (dict(type=Mona, bottleneck=4), 'petl', Mona),
    ],
)
def test_every_key_and_name_means_the_same(kind, tuner, child, found):
    wanted = keys(build('E3VASwinTransformer', tuner=tuner, **TINY))
    for key in ('tuner', 'side_path', 'method'):
        ours = build(kind, **{key: copy.deepcopy(tuner)}, **TINY)
        assert isinstance(ours, TunedBackbone)
        assert type(ours.tuner) is found
        assert ours.get_submodule(child) is ours.tuner
        assert keys(ours) == wanted


@pytest.mark.parametrize('kind', ['E3VABackbone', 'PETLBackbone'])
@pytest.mark.parametrize('key', ['tuner', 'side_path', 'method'])
def test_any_stock_backbone_takes_any_tuner(kind, key):
    trunk = copy.deepcopy(CASES['convnext'])
    need(trunk)
    ours = build(kind, trunk=trunk, **{key: dict(type='Mona', bottleneck=4)})
    assert type(ours.tuner) is Mona


def test_two_tuners_at_once_are_refused():
    with pytest.raises(ConfigError) as error:
        build_e3va(side_path={}, method=dict(type='LoRA'))
    assert str(error.value) == (
        '`backbone.side_path` and `backbone.method` both name what trains. '
        'Keep `tuner`.'
    )


@pytest.mark.parametrize(
    'tuner, message',
    [
        ('lean', r"`backbone.tuner` should be a dict.*, but got 'lean'"),
        (True, '`backbone.tuner` should be a dict'),
        (dict(type='LORA'), "`tuner.type` should be the name of a tuner.*'LO"),
        (dict(type='SwinTransformer'), '`tuner.type` should be the name of'),
        (dict(type=['LoRA']), '`tuner.type` should be the name'),
        (dict(type=nn.Linear), '`tuner.type` should be the name'),
        (dict(ranks=8), '`tuner.ranks` is unknown. Options are save_taps'),
        (dict(type='LoRA', preset='lean'), '`tuner.preset` is unknown'),
        (dict(type='Full', rank=8), r'`tuner.rank` is unknown.* are none'),
        (dict(rank=0), '`tuner.rank` should be a whole number from 1'),
        (dict(rank=17), 'should be in'),
        (dict(bottleneck_ratio=0.01), 'a stage of 32 channels a bottle'),
        (dict(taps=('mlp',)), r"`tuner.taps` .*\('attn', 'ffn'\).*'mlp'"),
        (dict(downsampling='mean'), "'difference', 'linear'.*got 'mean'"),
        (dict(save_taps='fp4'), "'exact', 'bf16', 'int8'.*got 'fp4'"),
        (dict(preset='Lean'), r"`tuner.preset`.*\('exact', 'lean'\).*'Lean'"),
        (dict(trunk_drop_path=1.0), '`tuner.trunk_drop_path` .*got 1.0'),
        (dict(trunk_dtype='bf16'), '`tuner.trunk_dtype` is unknown'),
        (dict(preset='lean', rang=8), '`tuner.rang` is unknown'),
    ],
)
def test_impossible_tuners_are_refused(tuner, message):
    with pytest.raises(ConfigError, match=message):
        build_e3va(tuner=tuner)


@pytest.mark.parametrize(
    'kind', ['mmdet.SwinTransformer', 'E3VASwinTransformer']
)
def test_a_config_with_another_tuner(kind):
    before = dict(type=kind, embed_dims=32, side_path=dict(preset='lean'))
    if kind.startswith('mmdet'):
        del before['side_path']
    else:
        kept = tuned_config(before, 'e3va_mm')
        assert kept['tuner'] == dict(type='E3VA', preset='lean')
    found = tuned_config(before, 'e3va_mm', dict(type='LoRA'))
    assert found == dict(
        type='e3va_mm.E3VASwinTransformer',
        embed_dims=32,
        tuner=dict(type='LoRA'),
    )


def test_the_config_of_any_stock_backbone():
    assert tuned_config(dict(type='BEiT', img_size=64), 'mmseg') == dict(
        type='e3va_mm.E3VAVisionTransformer',
        trunk_type='mmseg.BEiT',
        img_size=64,
        tuner=dict(type='E3VA'),
    )
    assert tuned_config(dict(type='MSCAN'), 'mmseg') == dict(
        type='e3va_mm.E3VABackbone',
        trunk=dict(type='mmseg.MSCAN'),
        tuner=dict(type='E3VA'),
    )


# -- Swin --------------------------------------------------------------------


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmengine'])
@pytest.mark.parametrize('installed', ['mmdet', 'mmseg'])
def test_one_framework_is_enough(scope, installed, monkeypatch):
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: name == installed or None
    )
    ours = build_e3va(scope)
    assert type(ours.patch_embed).__module__.startswith(installed)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_the_stock_swin_is_that_of_the_scope(scope):
    ours = build_e3va(scope)
    assert ours.trunk.stock_class.__module__.startswith(scope)


def test_without_a_framework_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install onedl-mmdetection'):
        build_e3va()
    with pytest.raises(ConfigError, match='pip install onedl-mmpretrain'):
        build('E3VABackbone', trunk=dict(type='mmpretrain.ConvNeXt'))


# -- ViT ---------------------------------------------------------------------

SMALL = dict(arch=VIT, img_size=64, patch_size=16)


def build_vit(scope='mmdet', **kwargs):
    pytest.importorskip('mmpretrain')
    with DefaultScope.overwrite_default_scope(scope):
        return build('E3VAVisionTransformer', **kwargs)


@pytest.mark.parametrize('name', VITS)
def test_every_class_of_vits_with_its_arguments_flat(name):
    need(VITS[name])
    config = copy.deepcopy(VITS[name])
    wanted = build('E3VABackbone', trunk=config)
    ours = build_vit(trunk_type=config.pop('type'), **config)
    assert ours.trunk.stock_class is wanted.trunk.stock_class
    assert keys(ours) == keys(wanted)


@pytest.mark.parametrize(
    'scope, module, attributes',
    [
        ('mmdet', 'mmpretrain.', dict(out_type='featmap')),
        ('mmpretrain', 'mmpretrain.', dict(out_type='cls_token')),
        ('mmseg', 'mmseg.', dict(patch_size=16)),
    ],
)
def test_the_stock_vit_follows_the_framework(scope, module, attributes):
    arguments = SMALL
    if scope == 'mmseg':
        arguments = dict(embed_dims=32, num_layers=2, num_heads=2)
    ours = build_vit(scope, **arguments)
    assert ours.trunk.stock_class.__module__.startswith(module)
    assert {key: getattr(ours, key) for key in attributes} == attributes


@pytest.mark.parametrize(
    'arguments, blocks, width, count',
    [
        (dict(arch='base'), 12, 768, 913_920),
        (dict(arch='large'), 24, 1024, 2_435_072),
        (
            dict(arch='dinov2-g', layer_cfgs=dict(ffn_type='swiglu_fused')),
            40,
            1536,
            6_085_632,
        ),
    ],
)
def test_trainable_counts_of_vits(arguments, blocks, width, count):
    """Two adapters a block, as on Swin, and the final norm."""
    with torch.device('meta'):
        ours = build_vit(img_size=518, patch_size=14, **arguments)
    assert count_parameters(ours)[1] == count
    half, rank = width // 2, 16
    adapter = 2 * rank * (width + half) + half + width
    assert count == 2 * blocks * adapter + 2 * width


def test_nothing_past_the_last_output_is_built():
    ours = build_vit(out_indices=[1], **SMALL)
    assert len(ours.layers) == 2 and not hasattr(ours, 'ln1')
    assert not any('layers.3' in key for key in ours.state_dict())
    whole = MODELS.build(dict(type='mmpretrain.VisionTransformer', **SMALL))
    ours.load_state_dict(whole.state_dict(), strict=False)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(arch=VIT, depths=3), '`depths` is no argument of mmpretrain'),
        (dict(arch='gigantic'), 'refuses its arguments: Arch gigantic'),
        (dict(SMALL, out_indices=[4]), r'some of its 4 blocks, .*got \(4,\)'),
        (dict(trunk_type='mmpretrain.None'), "no backbone 'mmpretrain.None'"),
        (dict(trunk_type=3), '`trunk_type` should be the name of a stock'),
        (
            dict(trunk_type='mmseg.VisionTransformer', out_origin=True),
            '`out_origin=True` asks for the embedding',
        ),
    ],
)
def test_impossible_vits_are_refused(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        build_vit(**kwargs)


# -- backbones of no known family --------------------------------------------


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Identity()

    def forward(self, x):
        return x + self.scale(self.conv(self.norm(x)))


@MODELS.register_module()
class UnheardOf(BaseModule):
    """Two stages of residual convolutions; of no family."""

    def __init__(self, out_indices=(0, 1), brought=False, init_cfg=None):
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.parts = nn.ModuleList(
            nn.Sequential(*[Block(16 * 2**i) for _ in range(2)])
            for i in range(2)
        )
        self.down = nn.Conv2d(16, 32, 2, 2)
        self._is_init = brought

    def forward(self, x):
        outs = []
        x = self.stem(x)
        for i, part in enumerate(self.parts):
            x = part(x if i == 0 else self.down(x))
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


STRANGER = dict(type='e3va_mm.UnheardOf')
LAYOUT = dict(
    blocks='parts.{stage}.{block}',
    taps=dict(branch='scale'),
    channels='norm',
    downsampling=['down'],
    embedding=['stem'],
    cut='parts',
)


def build_stranger(layout=LAYOUT, trunk=STRANGER, **kwargs):
    own = dict(trunk=trunk, layout=layout, tuner=dict(rank=4))
    return build('E3VABackbone', **own, **kwargs)


def test_a_declared_layout_is_enough():
    ours = build_stranger()
    stock = MODELS.build(STRANGER).eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(ours(image), stock(image), strict=True):
            torch.testing.assert_close(one, other)
    awake(ours.train())
    torch.stack([o.square().mean() for o in ours(image)]).sum().backward()
    for name, parameter in ours.named_parameters():
        trains = name.startswith('side_path.')
        assert (parameter.grad is not None) == trains, name


def test_without_a_downsampling_the_highway_ends_with_its_stage():
    ours = awake(build_stranger(dict(LAYOUT, downsampling=[])))
    ours(torch.randn(1, 3, 32, 32))[1].square().mean().backward()
    first, second = ours.side_path.stages
    # Zeros: both stages are outputs of one pass.
    assert not any(
        p.grad is not None and p.grad.any() for p in first.parameters()
    )
    assert all(p.grad.any() for p in second.parameters())


def test_weights_that_the_stock_class_brings_itself_stay():
    """As those of timm's with `pretrained=True`."""
    trunk = dict(STRANGER, brought=True)
    ours = build_stranger(trunk=trunk, allow_random_trunk=False)
    before = ours.stem.weight.clone()
    ours.init_weights()
    assert torch.equal(ours.stem.weight, before)
    ours.train()(torch.randn(1, 3, 32, 32))
    assert ours.trunk_source == 'UnheardOf itself'


def test_a_layout_needs_taps():
    with pytest.raises(ConfigError, match='`layout.taps` should be a dict of'):
        build_stranger(dict(LAYOUT, taps={}))
