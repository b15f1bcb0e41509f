"""Trunks of no known family, and what a config may say of them."""

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Layout
from tests.trunk_cases import CASES, awake, need


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

    def __init__(self, out_indices=(0, 1), drop=0.0, init_cfg=None):
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.parts = nn.ModuleList(
            nn.Sequential(*[Block(16 * 2**i) for _ in range(2)])
            for i in range(2)
        )
        self.down = nn.Conv2d(16, 32, 2, 2)

    def forward(self, x):
        outs = []
        x = self.stem(x)
        for i, part in enumerate(self.parts):
            x = part(x if i == 0 else self.down(x))
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


LAYOUT = dict(
    blocks='parts.{stage}.{block}',
    taps=dict(branch='scale'),
    channels='norm',
    downsampling=['down'],
    embedding=['stem'],
    cut='parts',
)


def build(layout=LAYOUT, **kwargs):
    return MODELS.build(
        dict(
            {
                'type': 'e3va_mm.E3VABackbone',
                'trunk': dict(type='e3va_mm.UnheardOf'),
                'layout': layout,
                'allow_random_trunk': True,
                'side_path': dict(rank=4),
            },
            **kwargs,
        )
    )


def test_an_unknown_family_is_asked_for_its_layout():
    with pytest.raises(ConfigError) as error:
        build(layout=None)
    text = str(error.value)
    assert 'UnheardOf is of no known family (' in text
    assert 'mmpretrain.ConvNeXt' in text
    # An example that can be copied.
    example = text[text.index('layout=dict(') : text.index('See e3va')]
    assert Layout.of(eval(example.replace('layout=', ''))).blocks


def test_a_declared_layout_is_enough():
    ours = build()
    ours.init_weights()
    stock = MODELS.build(dict(type='e3va_mm.UnheardOf'))
    stock.eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(ours(image), stock(image), strict=True):
            torch.testing.assert_close(one, other)
    ours.train()
    awake(ours)
    sum(o.square().mean() for o in ours(image)).backward()
    for name, parameter in ours.named_parameters():
        trains = name.startswith('side_path.')
        assert (parameter.grad is not None) == trains, name


def test_without_a_downsampling_the_highway_ends_with_its_stage():
    ours = build(dict(LAYOUT, downsampling=[]))
    ours.init_weights()
    awake(ours)
    image = torch.randn(1, 3, 32, 32)
    ours(image)[1].square().mean().backward()
    first, second = ours.side_path.stages
    # Zeros: both stages are outputs of one pass.
    assert not any(
        p.grad is not None and p.grad.any() for p in first.parameters()
    )
    assert all(p.grad.any() for p in second.parameters())


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(blocks='layers.{block}'), 'has no such modules .* stem, parts'),
        (dict(taps=dict(a='mlp')), '`layout.taps.a` is .* has no such module'),
        (dict(taps={}), 'side_path.taps'),
        (dict(channels='bn'), "no such modules with a 'bn' in them"),
        (dict(output_norm='norm{stage}'), "UnheardOf has no 'norm0'. Put a"),
        (dict(downsampling=['merge{next}']), "layout.downsampling.*'merge1'"),
        (dict(embedding=['patches']), "`layout.embedding` is 'patches'"),
        (dict(cut='stages'), "`layout.cut` is 'stages'"),
        (dict(cuts='parts'), '`layout.cuts` is unknown. A layout has blocks'),
    ],
)
def test_a_layout_that_does_not_fit(change, match):
    with pytest.raises(ConfigError, match=match):
        build({**LAYOUT, **change})


def test_a_layout_without_blocks():
    with pytest.raises(ConfigError, match='`layout.taps` is missing'):
        build(dict(blocks='a.{block}'))


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(trunk='ConvNeXt'), '`backbone.trunk` should be the config of'),
        (
            dict(trunk=dict(type='e3va_mm.UnheardOf', depth=3)),
            '`depth` is no argument of .*UnheardOf',
        ),
        (
            dict(trunk=dict(type='e3va_mm.UnheardOf', out_indices=(2,))),
            'should name some of its 2 stages',
        ),
        (
            dict(side_path=dict(trunk_drop_path=0.1)),
            'UnheardOf has no `drop_path_rate`',
        ),
        (
            dict(
                trunk=dict(
                    type='e3va_mm.UnheardOf',
                    init_cfg=dict(type='Pretrained', checkpoint='a'),
                ),
                init_cfg=dict(type='Pretrained', checkpoint='b'),
            ),
            'is set in `backbone` and in `backbone.trunk`',
        ),
    ],
)
def test_impossible_options(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        build(**kwargs)


def test_a_package_that_is_missing(monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'mmpretrain' else find_spec(name),
    )
    with pytest.raises(ConfigError, match='pip install onedl-mmpretrain'):
        build(trunk=dict(type='mmpretrain.ConvNeXt'))


def test_weights_that_the_stock_class_brings_itself_stay():
    """As those of timm's with `pretrained=True`."""

    @MODELS.register_module(force=True)
    class BroughtUp(UnheardOf):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            nn.init.constant_(self.stem.weight, 0.5)
            self._is_init = True

    ours = build(
        trunk=dict(type='e3va_mm.BroughtUp'), allow_random_trunk=False
    )
    ours.init_weights()
    assert (ours.stem.weight == 0.5).all()
    ours.train()
    ours(torch.randn(1, 3, 32, 32))
    assert ours.trunk_source == 'BroughtUp itself'


def test_timm_files_are_taken_by_their_own_names(tmp_path):
    need(CASES['timm vit'])
    import timm

    for name, kwargs in (
        ('convnext_atto', dict(out_indices=(0, 1, 2, 3))),
        ('vit_tiny_patch16_224', dict(img_size=64, depth=4)),
    ):
        whole = timm.create_model(
            name, **{k: v for k, v in kwargs.items() if k != 'out_indices'}
        )
        path = tmp_path / f'{name}.pth'
        torch.save(whole.state_dict(), path)
        ours = build(
            layout=None,
            trunk=dict(
                type='mmpretrain.TIMMBackbone',
                model_name=name,
                features_only=True,
                **kwargs,
            ),
            init_cfg=dict(type='Pretrained', checkpoint=str(path)),
        )
        ours.init_weights()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            got = ours(image)[-1]
            features = whole.eval().forward_intermediates(
                image, intermediates_only=True
            )
        torch.testing.assert_close(got, features[-1], rtol=1e-4, atol=1e-4)


def test_timm_without_features_is_refused():
    need(CASES['timm vit'])
    with pytest.raises(ConfigError, match='`features_only=True`'):
        build(
            layout=None,
            trunk=dict(
                type='mmpretrain.TIMMBackbone', model_name='convnext_atto'
            ),
        )
