"""Output norm and inherited downsampling against plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from e3va_mm.trunks import Band, Downsampling
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.tuners.e3va.stage_sum import (
    TokenNorm,
    downsample_difference,
    downsample_linear,
    keep,
    normalise,
)

C, SIZE = 12, (5, 3)
L = SIZE[0] * SIZE[1]
FLOAT = 4  # bytes

GENERATOR = torch.Generator().manual_seed(1)
WEIGHT = torch.randn(7, 3 * C, generator=GENERATOR, dtype=torch.float64)
GAIN = torch.randn(3 * C, generator=GENERATOR, dtype=torch.float64)


def gather(tokens, norm=True):
    """Three neighbours beside each other, and a norm."""
    patches = tokens.unflatten(1, (-1, 3)).flatten(2)
    if not norm:
        return patches
    return F.layer_norm(patches, patches.shape[-1:], GAIN.to(tokens.dtype))


def bands(batch):
    """One token of five after the other, unlike sizes at a time."""
    for first, last in ((0, 1), (1, 3), (3, 5)):
        yield Band(slice(3 * first, 3 * last), slice(first, last), gather)


def downsampling(dtype=torch.float64, bands=bands):
    # A copy at every call, as a trunk makes that stores it otherwise.
    return Downsampling(gather, lambda: WEIGHT.to(dtype, copy=True), bands)


def drawn_norm(dtype=torch.float64):
    norm = nn.LayerNorm(C)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, C))
        norm.bias.normal_()
    return norm.to(dtype)


def drawn_sum(dtype=torch.float64):
    """Trunk and sum; means of tokens are larger than their deviations."""
    trunk, highway = torch.randn(2, 2, L, C, dtype=torch.float64)
    trunk += 5 * torch.randn(2, L, 1)
    total = (trunk + highway).to(dtype).requires_grad_()
    return trunk.to(dtype), total


def ours(norm, trunk, total):
    """The map and what the next stage inherits."""
    output, kept = normalise(TokenNorm.of(norm), total, SIZE)
    return output, downsample_difference(
        total, trunk, kept, downsampling(total.dtype)
    )


def plain(norm, trunk, total):
    output = norm(total).transpose(1, 2).reshape(-1, C, *SIZE)
    gathered = gather(total) - gather(trunk)
    return output, gathered @ WEIGHT.t().to(total.dtype)


def noise_like(tensor):
    generator = torch.Generator().manual_seed(tensor.shape[1])
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def gradients(outputs, inputs):
    """Under a loss that weighs every value; by None what is not reached."""
    loss = sum((output * noise_like(output)).sum() for output in outputs)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_close(got, expected, bound):
    """Relative to the norm of each tensor."""
    assert len(got) == len(expected)
    for one, target in zip(got, expected, strict=True):
        assert (one is None) == (target is None)
        if target is not None:
            error = (one.double() - target).norm() / target.norm()
            assert error < bound, error


# Norms whose input does not come back from the output...
def zero_weight(norm):
    norm.weight.data[4] = 0.0


def large_bias(norm):
    norm.bias.data[4] = 1e8 * norm.weight.data[4]


def vanishing(norm):
    norm.weight.data.mul_(1e-120)
    norm.bias.data.zero_()


def without_parameters(norm):
    return nn.LayerNorm(C, elementwise_affine=False, dtype=torch.float64)


def without_bias(norm):
    norm.bias = None


def of_another_kind(norm):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.weight, self.bias = norm, norm.weight, norm.bias

        def forward(self, x):
            return 2 * self.norm(x)

    return Doubled()


CHANGES = [
    zero_weight,
    large_bias,
    vanishing,
    without_parameters,
    without_bias,
    of_another_kind,
]


@pytest.mark.parametrize('change', [None, *CHANGES])
@pytest.mark.parametrize('used', [(0, 1), (0,), (1,)])
def test_equal_plain_autograd(change, used):
    norm = drawn_norm()
    norm = (change(norm) if change else None) or norm
    trunk, total = drawn_sum()
    inputs = [total, *norm.parameters()]
    got, expected = ours(norm, trunk, total), plain(norm, trunk, total)
    for one, target in zip(got, expected, strict=True):
        torch.testing.assert_close(one, target)
    assert_close(
        gradients([got[i] for i in used], inputs),
        gradients([expected[i] for i in used], inputs),
        1e-9,
    )
    # The map is kept where the sum comes back from it, else the sum.
    output, kept = normalise(TokenNorm.of(norm), total, SIZE)
    back = kept.restore(kept.tensors)
    torch.testing.assert_close(back, total.detach(), rtol=1e-9, atol=1e-9)
    held = {t.untyped_storage().data_ptr() for t in kept.tensors}
    source = output if change is None else total
    assert source.untyped_storage().data_ptr() in held


def test_bands_change_nothing():
    trunk, total = drawn_sum()
    got, expected = (
        [out, *torch.autograd.grad(out, total, noise_like(out))]
        for out in (
            downsample_difference(
                total, trunk, keep(total), downsampling(bands=some)
            )
            for some in (bands, None)
        )
    )
    torch.testing.assert_close(got, expected)


def test_gradcheck_in_fp64():
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    torch.autograd.gradcheck(
        lambda *_: ours(norm, trunk, total), (total, norm.weight, norm.bias)
    )
    torch.autograd.gradcheck(
        lambda total: downsample_linear(total, downsampling()), total
    )


@pytest.mark.parametrize('ratio', [0.1, 10.0, 250.0, 260.0, 1e5])
def test_fp32_is_within_1e5_of_fp64_whatever_the_bias(ratio):
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    with torch.no_grad():
        norm.bias.copy_(norm.weight * ratio)
        norm.bias[::2].neg_()
    expected = gradients(
        plain(norm, trunk, total), [total, norm.weight, norm.bias]
    )
    norm, trunk = norm.float(), trunk.float()
    total = total.detach().float().requires_grad_()
    got = gradients(ours(norm, trunk, total), [total, norm.weight, norm.bias])
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('ratio', [0.1, 7.9, 1e3])
def test_under_autocast_the_map_is_in_its_type(dtype, ratio):
    norm, (trunk, total) = drawn_norm(torch.float32), drawn_sum(torch.float32)
    with torch.no_grad():
        norm.bias.copy_(norm.weight * ratio)
    inputs = [total, norm.weight, norm.bias]
    expected = gradients(plain(norm, trunk, total), inputs)
    with torch.autocast('cpu', dtype=dtype):
        output, inherited = ours(norm, trunk, total)
    assert output.dtype == dtype
    assert inherited.dtype == torch.float32
    torch.testing.assert_close(
        output, plain(norm, trunk, total)[0].to(dtype), rtol=0, atol=0
    )
    got = gradients([output.float(), inherited], inputs)
    assert_close(got, expected, 8 * torch.finfo(dtype).eps)


def test_gradients_of_any_layout_are_right():
    """A sum expands its gradient, a convolution may turn it."""
    norm, (_, total) = drawn_norm(), drawn_sum()
    inputs = [total, norm.weight, norm.bias]
    for change in (
        lambda maps: maps.mean((2, 3), keepdim=True).expand_as(maps) * 1.0,
        lambda maps: maps.contiguous(memory_format=torch.channels_last) * 3.0,
        lambda maps: maps.sum((2, 3))[..., None],
    ):
        output, _ = normalise(TokenNorm.of(norm), total, SIZE)
        expected = norm(total).transpose(1, 2).reshape(-1, C, *SIZE)
        assert_close(
            gradients([change(output)], inputs),
            gradients([change(expected)], inputs),
            1e-9,
        )


@pytest.mark.parametrize('part', ['weight', 'bias', 'both', 'total'])
def test_what_is_frozen_gets_no_gradient(part):
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    inputs = dict(total=total, weight=norm.weight, bias=norm.bias)
    frozen = ['weight', 'bias'] if part == 'both' else [part]
    for name in frozen:
        inputs.pop(name).requires_grad_(False)
    inputs = list(inputs.values())
    assert_close(
        gradients(ours(norm, trunk, total), inputs),
        gradients(plain(norm, trunk, total), inputs),
        1e-9,
    )


def kept_by(function, *own):
    """Bytes that ``function`` leaves in the graph, beside ``own``."""
    known = {t.untyped_storage().data_ptr() for t in own}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = function()
    return sum(size for key, size in kept.items() if key not in known), results


def test_map_mean_and_deviation_are_all_that_is_kept():
    norm, (trunk, total) = drawn_norm(torch.float32), drawn_sum(torch.float32)
    own = (norm.weight, norm.bias)
    tokens = 2 * L
    kept, _ = kept_by(lambda: normalise(TokenNorm.of(norm), total, SIZE), *own)
    assert kept == FLOAT * tokens * (C + 1)  # no mean
    kept, _ = kept_by(lambda: ours(norm, trunk, total), *own)
    assert kept == FLOAT * tokens * (C + 2)


@pytest.mark.parametrize(
    'mode, of_a_token, once',
    [
        ('exact', 4 * C, 0),
        ('bf16', 2 * C, 0),
        ('int8', C + 4, 8 * C),
        (None, 4 * C, 0),
    ],
)
def test_without_a_norm_the_sum_is_kept_by_the_codec(mode, of_a_token, once):
    trunk, total = drawn_sum(torch.float32)

    def inherited():
        kept = keep(total, mode and TAP_CODECS[mode])
        return downsample_difference(
            total, trunk, kept, downsampling(total.dtype)
        )

    kept, got = kept_by(inherited)
    assert kept == 2 * L * of_a_token + once
    _, expected = plain(nn.Identity(), trunk, total)
    torch.testing.assert_close(got, expected)
    assert_close(
        gradients([got], [total]),
        gradients([expected], [total]),
        {'bf16': 2e-2, 'int8': 2e-2}.get(mode, 1e-5),
    )


def test_linear_downsampling_keeps_nothing():
    _, total = drawn_sum(torch.float32)
    kept, got = kept_by(
        lambda: downsample_linear(total, downsampling(total.dtype))
    )
    assert got.requires_grad
    assert kept == 0
    expected = gather(total, norm=False) @ WEIGHT.t().float()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        gradients([got], [total]), gradients([expected], [total])
    )


def test_linear_downsampling_in_another_type_than_its_weight():
    """A 16-bit trunk beside a highway in single precision."""
    _, total = drawn_sum(torch.float32)
    got = downsample_linear(total, downsampling(torch.bfloat16))
    expected = gather(total, norm=False) @ WEIGHT.t().float()
    (gradient,) = gradients([got.float()], [total])
    assert gradient.dtype == torch.float32
    assert_close([gradient], gradients([expected], [total]), 1e-2)


@pytest.mark.parametrize('change', [None, zero_weight])
def test_backward_twice_and_by_a_checkpoint_give_the_same(change):
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    if change:
        change(norm)
    inputs = [total, norm.weight, norm.bias]
    outputs = ours(norm, trunk, total)
    loss = sum((output * noise_like(output)).sum() for output in outputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    got = checkpoint(ours, norm, trunk, total, use_reentrant=False)
    third = gradients(got, inputs)
    for one, *others in zip(first, second, third, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize('used', [0, 1])
def test_a_gradient_of_the_gradient_is_refused(used):
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    output = ours(norm, trunk, total)[used]
    (gradient,) = torch.autograd.grad(
        output.square().sum(), total, create_graph=True
    )
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


@pytest.mark.parametrize('used', [0, 1])
@pytest.mark.parametrize('changed', ['map', 'weight', 'bias'])
def test_what_has_changed_since_is_noticed(used, changed):
    """The sum would come back wrong from it."""
    norm, (trunk, total) = drawn_norm(), drawn_sum()
    outputs = ours(norm, trunk, total)
    loss = outputs[used].square().sum()
    with torch.no_grad():
        dict(map=outputs[0], weight=norm.weight, bias=norm.bias)[changed].mul_(
            2
        )
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()
