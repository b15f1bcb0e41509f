"""A Swin of one block with a tuner inside, and its formula written out."""

import torch
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from tests.helpers import randomised

SIZE = (7, 14)
IMAGE = (1, 3, 4 * SIZE[0], 4 * SIZE[1])
TRUNK = dict(
    embed_dims=16, depths=(1,), num_heads=(2,), strides=(4,), out_indices=(0,)
)


def build(kind, **options):
    """In double precision, with drawn weights, large in what was added."""
    ours = MODELS.build(
        dict(
            TRUNK,
            type='e3va_mm.E3VASwinTransformer',
            tuner=dict(options, type=f'e3va_mm.{kind}'),
            allow_random_trunk=True,
        )
    )
    ours = randomised(ours.double())
    with torch.no_grad():
        for parameter in ours.tuner.parameters():
            parameter.mul_(5)
    return ours.eval()


def bottleneck(part, x):
    return part.up(F.gelu(part.down(x)))


def attention(block, size, x):
    """What the attention branch gives, by windows without a shift."""
    rows, columns = size[0] // 7, size[1] // 7
    grid = block.norm1(x).unflatten(1, (rows, 7, columns, 7))
    windows = grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    done = block.attn.w_msa(windows).unflatten(0, (-1, rows, columns))
    return done.unflatten(3, (7, 7)).transpose(2, 3).flatten(1, 4)


def check(ours, attn, ffn, attend=attention):
    """Outputs and gradients against a formula.

    Args:
        ours (nn.Module): Of :func:`build`.
        attn (Callable): (stream, what attention gives) -> next stream.
        ffn (Callable): The same of the MLP.
        attend (Callable): (block, grid, stream) -> what attention gives.
    """
    image = torch.randn(IMAGE, dtype=torch.float64)
    found = ours(image)[0]
    block = ours.stages[0].blocks[0]
    x, size = ours.patch_embed(image)
    x = attn(x, attend(block, size, x))
    x = ffn(x, block.ffn.layers(block.norm2(x)))
    x = F.layer_norm(x, x.shape[-1:], ours.norm0.weight, ours.norm0.bias)
    expected = x.transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    weight, given = torch.randn_like(found), list(ours.tuner.parameters())
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), given),
        strict=True,
    ):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
