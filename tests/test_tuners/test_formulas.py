"""Each method on one Swin block, beside its formula written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import randomised

SIZE = (7, 14)
TRUNK = dict(
    embed_dims=16,
    depths=(1,),
    num_heads=(2,),
    strides=(4,),
    out_indices=(0,),
)
IMAGE = (1, 3, 4 * SIZE[0], 4 * SIZE[1])


def build(kind, **kwargs):
    ours = MODELS.build(
        dict(
            TRUNK,
            type='e3va_mm.PETLSwinTransformer',
            method=dict(kwargs, type=f'e3va_mm.{kind}'),
            allow_random_trunk=True,
        )
    )
    ours = randomised(ours.double())
    with torch.no_grad():
        for parameter in ours.petl.parameters():
            parameter.mul_(5)
    return ours.eval()


def stock_forward(ours, branches):
    """The backbone's output, its two branches given as functions."""
    block = ours.stages[0].blocks[0]

    def run(image):
        x, size = ours.patch_embed(image)
        attn, ffn = branches(block, size)
        x = attn(x)
        x = ffn(x)
        x = F.layer_norm(x, x.shape[-1:], ours.norm0.weight, ours.norm0.bias)
        return x.transpose(1, 2).unflatten(2, size)

    return run


def attention(block, size, x):
    return (
        block.attn.w_msa(
            block.norm1(x)
            .unflatten(1, size)
            .unflatten(1, (-1, 7))
            .unflatten(3, (-1, 7))
            .transpose(2, 3)
            .flatten(1, 2)
            .flatten(0, 1)
            .flatten(1, 2)
        )
        .unflatten(0, (-1, size[0] // 7, size[1] // 7))
        .unflatten(3, (7, 7))
        .transpose(2, 3)
        .flatten(3, 4)
        .flatten(1, 2)
        .flatten(1, 2)
    )


def mlp(block, x):
    return block.ffn.layers(block.norm2(x))


def bottleneck(parts, x):
    return parts.up(F.gelu(parts.down(x)))


def adapter(ours):
    parts = ours.petl.blocks[0]

    def branches(block, size):
        def attn(x):
            x = x + attention(block, size, x)
            return x + bottleneck(parts['attn'], x)

        def ffn(x):
            m = mlp(block, x)
            return x + m + bottleneck(parts['ffn'], m)

        return attn, ffn

    return branches


def adaptformer(ours):
    parts = ours.petl.blocks[0]

    def branches(block, size):
        def attn(x):
            added = 0.1 * bottleneck(parts['attn'], x)
            return x + attention(block, size, x) + added

        def ffn(x):
            return x + mlp(block, x) + 0.1 * bottleneck(parts['ffn'], x)

        return attn, ffn

    return branches


def lorand(ours):
    parts = ours.petl.blocks[0]

    def linear(layer, x):
        weight = sum(
            a @ g @ b
            for a, g, b in zip(layer.a, layer.g, layer.b, strict=True)
        )
        return x @ weight + layer.bias

    def tuned(part, x):
        return x + linear(part.up, F.gelu(linear(part.down, x)))

    def branches(block, size):
        return (
            lambda x: x + tuned(parts['attn'], attention(block, size, x)),
            lambda x: x + tuned(parts['ffn'], mlp(block, x)),
        )

    return branches


def mona(ours):
    parts = ours.petl.blocks[0]

    def tuned(part, x):
        z = part.norm(x) * part.gamma + x * part.gamma_x
        z = part.down(z).transpose(1, 2).unflatten(2, SIZE)
        filters = part.filters
        z = (
            z
            + (
                filters.filters[0](z)
                + filters.filters[1](z)
                + filters.filters[2](z)
            )
            / 3
        )
        z = z + filters.mix(z)
        return x + part.up(F.gelu(z).flatten(2).transpose(1, 2))

    def branches(block, size):
        return (
            lambda x: tuned(parts['attn'], x + attention(block, size, x)),
            lambda x: tuned(parts['ffn'], x + mlp(block, x)),
        )

    return branches


def lora(ours):
    update = ours.petl.updates[0]
    qkv = ours.stages[0].blocks[0].attn.w_msa.qkv
    q = update.up[0] @ update.down[0]
    v = update.up[1] @ update.down[1]
    weight = qkv.weight + torch.cat([q, torch.zeros_like(q), v])
    tuned = nn.Linear(16, 48).double()
    del tuned.weight
    tuned.weight, tuned.bias = weight, qkv.bias

    def branches(block, size):
        def attn(x):
            block.attn.w_msa.qkv = tuned
            try:
                return x + attention(block, size, x)
            finally:
                block.attn.w_msa.qkv = qkv

        return attn, lambda x: x + mlp(block, x)

    return branches


@pytest.mark.parametrize(
    'kind, formula',
    [
        ('Adapter', adapter),
        ('AdaptFormer', adaptformer),
        ('LoRand', lorand),
        ('Mona', mona),
        ('LoRA', lora),
    ],
)
def test_outputs_and_gradients_are_those_of_the_formula(kind, formula):
    ours = build(kind)
    torch.manual_seed(0)
    image = torch.randn(IMAGE, dtype=torch.float64)
    given = list(ours.petl.parameters())
    found = ours(image)[0]
    expected = stock_forward(ours, formula(ours))(image)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), given),
        strict=True,
    ):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_adaptformer_keeps_no_second_copy_of_a_stream():
    """Its second adapter reads the tensor that the second norm reads."""
    ours = build('AdaptFormer')
    block, read = ours.stages[0].blocks[0], []
    for module in (block.norm2, ours.petl.blocks[0]['ffn'].down):
        module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ours(torch.randn(IMAGE, dtype=torch.float64))
    norm, adapter = read
    assert norm.data_ptr() == adapter.data_ptr()


def test_what_is_added_makes_a_difference():
    ours = build('Adapter')
    image = torch.randn(IMAGE, dtype=torch.float64)
    before = ours(image)[0]
    for parameter in ours.petl.parameters():
        nn.init.zeros_(parameter)
    assert not torch.allclose(before, ours(image)[0])


@pytest.mark.parametrize('alpha', [None, 16])
def test_lora_merges_exactly_and_leaves_a_stock_backbone(alpha):
    ours = build('LoRA', rank=4, alpha=alpha).float()
    image = torch.randn(IMAGE)
    with torch.no_grad():
        before = ours(image)[0]
        ours.merge()
        after = ours(image)[0]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not list(ours.petl.parameters())
    assert ours.trunk_source.endswith(', merged')
    assert ours.trunk_address is None
    stock = MODELS.build(dict(TRUNK, type='mmdet.SwinTransformer'))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    stock.load_state_dict(ours.state_dict())
    stock.eval()  # of mmdet, which returns nothing
    torch.testing.assert_close(stock(image)[0], after)


@pytest.mark.parametrize('kind', ['Adapter', 'AdaptFormer', 'LoRand', 'Mona'])
def test_what_no_weight_can_hold_does_not_merge(kind):
    with pytest.raises(ConfigError, match=f'{kind} adds computations that no'):
        build(kind).merge()


@pytest.mark.parametrize(
    'kind', ['Full', 'Fixed', 'BitFit', 'NormTuning', 'Partial']
)
def test_what_is_in_the_stock_weights_is_merged_already(kind):
    ours = build(kind)
    image = torch.randn(IMAGE, dtype=torch.float64)
    before = ours(image)[0]
    ours.merge()
    assert torch.equal(ours(image)[0], before)


@pytest.mark.parametrize(
    'kind, options, message',
    [
        ('LoRA', dict(rank=0), '`method.rank` should be a whole number'),
        ('LoRA', dict(alpha='a'), '`method.alpha` should be a number'),
        ('LoRA', dict(parts=('x',)), '`method.parts` should name some of'),
        ('LoRA', dict(parts=()), '`method.parts` should be a list of names'),
        ('LoRA', dict(parts=5), '`method.parts` should be a list of names'),
        ('LoRA', dict(layers=None), '`method.layers` should be a list of'),
        ('LoRA', dict(layers='qkv'), '`method.layers` should be a list of'),
        ('LoRA', dict(layers=('qkv', 'fc9')), 'names fc9, but no block has'),
        ('LoRA', dict(layers=('nope',)), 'Expected linear layers named nope'),
        ('Adapter', dict(bottleneck=1.5), '`method.bottleneck` should be a'),
        ('AdaptFormer', dict(scale=True), '`method.scale` should be a number'),
        ('AdaptFormer', dict(branches=('x',)), 'Expected a branch named by'),
        ('AdaptFormer', dict(branches=5), '`method.branches` should be a li'),
        ('AdaptFormer', dict(branches=('attn', 'fnn')), 'names fnn, but no'),
        ('BitFit', dict(position_tables='no'), 'should be True or False, but'),
        ('LoRand', dict(rank=-1), '`method.rank` should be a whole number'),
        ('LoRand', dict(branches=0), '`method.branches` should be a whole'),
        ('Mona', dict(dropout=1), '`method.dropout` should be a number from'),
        ('Partial', dict(blocks=2), 'from 1 to the 1 blocks of Swin'),
        ('BitFit', dict(nope=1), '`method` of the backbone: '),
    ],
)
def test_impossible_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


def test_lora_of_other_layers_takes_them_whole():
    ours = build('LoRA', rank=2, layers=('proj', 'qkv'), parts=('k',))
    sizes = [tuple(p.shape) for p in ours.petl.parameters()]
    assert sizes == [(2, 16), (16, 2)] * 2


@pytest.mark.parametrize(
    'method',
    [None, 'lora', dict(rank=1), dict(type='e3va_mm.SimpleFeaturePyramid')],
)
def test_a_method_is_a_config(method):
    config = dict(TRUNK, type='e3va_mm.PETLSwinTransformer', method=method)
    with pytest.raises(ConfigError, match='`backbone.method` should be the'):
        MODELS.build(config)
