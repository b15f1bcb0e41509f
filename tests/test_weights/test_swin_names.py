import pytest
import torch
from torch import nn

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import describe_swin, to_stock_keys

EMBED, DEPTHS, HEADS, WINDOW = 8, (2, 1, 3), (2, 4, 8), 4


def official_swin():
    """Random weights with the names and shapes of Microsoft's files."""
    torch.manual_seed(0)
    shapes = {
        'patch_embed.proj.weight': (EMBED, 3, 4, 4),
        'patch_embed.proj.bias': (EMBED,),
        'patch_embed.norm.weight': (EMBED,),
        'patch_embed.norm.bias': (EMBED,),
    }
    for i, depth in enumerate(DEPTHS):
        dims = EMBED * 2**i
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            if j % 2:
                shapes[f'{block}.attn_mask'] = (4, WINDOW**2, WINDOW**2)
            shapes[f'{block}.attn.relative_position_bias_table'] = (
                (2 * WINDOW - 1) ** 2,
                HEADS[i],
            )
            shapes[f'{block}.attn.relative_position_index'] = (
                WINDOW**2,
                WINDOW**2,
            )
            for name, width in (('norm1', dims), ('norm2', dims)):
                shapes[f'{block}.{name}.weight'] = (width,)
                shapes[f'{block}.{name}.bias'] = (width,)
            for name, out, width in (
                ('attn.qkv', 3 * dims, dims),
                ('attn.proj', dims, dims),
                ('mlp.fc1', 4 * dims, dims),
                ('mlp.fc2', dims, 4 * dims),
            ):
                shapes[f'{block}.{name}.weight'] = (out, width)
                shapes[f'{block}.{name}.bias'] = (out,)
        if i < len(DEPTHS) - 1:
            merge = f'layers.{i}.downsample'
            shapes[f'{merge}.reduction.weight'] = (2 * dims, 4 * dims)
            shapes[f'{merge}.norm.weight'] = (4 * dims,)
            shapes[f'{merge}.norm.bias'] = (4 * dims,)
    shapes['norm.weight'] = shapes['norm.bias'] = (dims,)
    shapes['head.weight'] = (5, dims)
    shapes['head.bias'] = (5,)
    return {key: torch.rand(shape) for key, shape in shapes.items()}


def _prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def _same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


def test_official_weights_become_what_the_stock_converter_makes():
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    stock = swin.swin_converter(official_swin())
    ours, name = to_stock_keys(official_swin())
    assert name == 'official Swin'
    assert ours.pop('head.weight').shape == (5, 32)
    assert ours.pop('head.bias').shape == (5,)
    assert _same(_prefixed('backbone.', ours), stock)


def test_every_official_weight_arrives_in_a_stock_backbone():
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    model = swin.SwinTransformer(
        embed_dims=EMBED,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        strides=(4, 2, 2),
        out_indices=(),
    )
    ours, _ = to_stock_keys(official_swin())
    result = model.load_state_dict(ours, strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == [
        'head.bias',
        'head.weight',
        'norm.bias',
        'norm.weight',
        'stages.0.blocks.1.attn_mask',
        'stages.2.blocks.1.attn_mask',
    ]


def test_patch_merging_computes_the_same_after_the_conversion():
    """The two orders of the merged channels, each used as its code does."""
    state = official_swin()
    ours, _ = to_stock_keys(state)
    x = torch.rand(1, EMBED, 6, 6)
    old, new = 'layers.0.downsample.', 'stages.0.downsample.'
    merged = torch.cat(
        [
            x[:, :, row::2, column::2]
            for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))
        ],
        dim=1,
    ).flatten(2)
    unfolded = nn.Unfold(kernel_size=2, stride=2)(x)

    def merge(values, weights, prefix):
        values = nn.functional.layer_norm(
            values.transpose(1, 2),
            (4 * EMBED,),
            weights[f'{prefix}norm.weight'],
            weights[f'{prefix}norm.bias'],
        )
        return values @ weights[f'{prefix}reduction.weight'].T

    torch.testing.assert_close(
        merge(unfolded, ours, new), merge(merged, state, old)
    )
    assert not torch.allclose(
        merge(unfolded, ours, new), merge(unfolded, state, old)
    )


STOCK, _ = to_stock_keys(official_swin())


@pytest.mark.parametrize(
    'content, name, expected',
    [
        ({'model': official_swin()}, 'official Swin', STOCK),
        ({'model': official_swin(), 'epoch': 3}, 'official Swin', STOCK),
        (_prefixed('module.', official_swin()), 'official Swin', STOCK),
        (STOCK, 'MM backbone', STOCK),
        ({'state_dict': STOCK, 'meta': {}}, 'MM backbone', STOCK),
        (
            {
                'state_dict': {
                    **_prefixed('module.backbone.', STOCK),
                    'module.neck.conv.weight': torch.zeros(1),
                    'module.rpn_head.backbone.x': torch.zeros(1),
                }
            },
            'MM model',
            STOCK,
        ),
    ],
)
def test_formats(content, name, expected):
    ours, found = to_stock_keys(content)
    assert found == name
    assert _same(ours, expected)


@pytest.mark.parametrize(
    'content, first',
    [
        ({'conv1.weight': torch.zeros(1)}, 'conv1.weight'),
        (
            {'state_dict': {'backbone.conv1.weight': torch.zeros(1)}},
            'backbone.conv1.weight',
        ),
        # ConvNeXt has stages as well
        ({'stages.0.0.norm.weight': torch.zeros(1)}, 'stages.0.0.norm.weight'),
        ({'meta': 3}, 'the first keys are meta.'),
    ],
)
def test_an_unknown_format_names_its_first_keys_and_what_is_accepted(
    content, first
):
    with pytest.raises(CheckpointError) as error:
        to_stock_keys(content)
    text = str(error.value)
    assert first in text
    assert 'layers.0.blocks.0.attn.qkv.weight' in text
    assert 'stages.0.blocks.0.attn.w_msa.qkv.weight' in text


def test_describe_swin():
    assert describe_swin(STOCK) == {
        'embed_dims': EMBED,
        'depths': DEPTHS,
        'num_heads': HEADS,
        'window_size': WINDOW,
    }
