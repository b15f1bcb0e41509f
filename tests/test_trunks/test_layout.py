"""Trunks of no known family, whose layout a config declares."""

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Layout, StageSpec, TrunkOptions, build_trunk


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Identity()

    def forward(self, x):
        return x + self.scale(self.conv(self.norm(x)))


class UnheardOf(nn.Module):
    """Two stages of residual convolutions."""

    def __init__(self):
        super().__init__()
        self.out_indices = (0, 1)
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.parts = nn.ModuleList(
            nn.Sequential(*[Block(16 * 2**i) for _ in range(2)])
            for i in range(2)
        )
        self.down = nn.Conv2d(16, 32, 2, 2)

    def forward(self, x):
        x = self.parts[0](self.stem(x))
        return x, self.parts[1](self.down(x))


LAYOUT = dict(
    blocks='parts.{stage}.{block}',
    taps=dict(branch='scale'),
    channels='norm',
    downsampling=['down'],
    embedding=['stem'],
    cut='parts',
)


def build(**changes):
    layout = Layout.of({**LAYOUT, **changes})
    return build_trunk(UnheardOf().eval(), TrunkOptions(), layout)


def test_an_unknown_family_is_asked_for_its_layout():
    with pytest.raises(ConfigError) as error:
        build_trunk(UnheardOf(), TrunkOptions())
    text = str(error.value)
    assert 'UnheardOf is of no known family (' in text
    assert 'mmpretrain.ConvNeXt' in text
    # An example that can be copied.
    example = text[text.index('layout=dict(') : text.index('See e3va')]
    assert Layout.of(eval(example.replace('layout=', ''))).blocks


def test_a_declared_layout_is_enough():
    trunk = build()
    assert trunk.stages() == [
        StageSpec(16, 2, ('branch',)),
        StageSpec(32, 2, ('branch',)),
    ]
    image, taps, ends = torch.randn(2, 3, 32, 32), [], []
    with torch.no_grad():
        outputs = trunk.stock(image)
        trunk.run(
            image,
            1,
            ('branch',),
            lambda *tap: taps.append(tap[:3]),
            lambda stage, end: ends.append(end),
        )
    assert taps == [(i, j, 'branch') for i in (0, 1) for j in (0, 1)]
    for output, end in zip(outputs, ends, strict=True):
        assert output.shape[2:] == end.size
        torch.testing.assert_close(end.tokens.mT.view_as(output), output)
    down = trunk.downsampling(0, ends[0].size)
    expected = trunk.stock.down(outputs[0]).flatten(2).mT
    torch.testing.assert_close(down.gather(ends[0].tokens), expected)
    assert trunk.highway_goes_on
    assert not build(downsampling=[]).highway_goes_on


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(blocks='layers.{block}'), 'has no such modules .* stem, parts'),
        (dict(blocks=None), '`layout.blocks` should be a path, but got None'),
        (dict(taps=dict(a='mlp')), '`layout.taps.a` is .* has no such module'),
        (dict(taps='scale'), '`layout.taps` should be a dict of paths'),
        (dict(channels='bn'), "no such modules with a 'bn' in them"),
        (dict(output_norm='norm{stage}'), "UnheardOf has no 'norm0'. Put a"),
        (dict(downsampling='down'), '`layout.downsampling` should be a list'),
        (dict(downsampling=['merge{next}']), "layout.downsampling.*'merge1'"),
        (dict(embedding=['patches']), "`layout.embedding` is 'patches'"),
        (dict(cut='stages'), "`layout.cut` is 'stages'"),
        (dict(cuts='parts'), '`layout.cuts` is unknown. Options are blocks'),
    ],
)
def test_a_layout_that_does_not_fit(change, match):
    with pytest.raises(ConfigError, match=match):
        build(**change)


def test_a_layout_needs_blocks_and_taps():
    with pytest.raises(ConfigError, match='`layout.taps` is missing'):
        Layout.of(dict(blocks='a.{block}'))
