"""Gradients of the whole backbone, whatever is kept for backward.

The reference is plain autograd in plain torch, in fp64.
"""

import gc
import math
import weakref

import pytest
import torch

from e3va_mm.measure import LiveBytes, kept_for_backward
from tests.helpers import TINY, e3va_and_stock
from tests.reference import e3va as reference

# Two pictures of odd sizes: padding in windows and in patch merging.
IMAGE = (2, 3, 51, 75)
CHANNELS = (32, 64, 128, 256)
# (H, W) of the stages: strides 4, 2, 2, 2, each rounded up.
GRIDS = ((13, 19), (7, 10), (4, 5), (2, 3))
RANK = 16
EXACT = ('exact', 'recompute')
# Largest relative error of any parameter's gradient, smallest cosine of all.
LOSSY = {
    'bf16': (1e-2, 0.99998),
    'int8': (4e-2, 0.9995),
    'int4': (3e-1, 0.98),
}
MODES = (*EXACT, *LOSSY)


def drawn(module, seed=1):
    """Adapters that give a highway as large as the trunk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = len(parameter) if parameter.ndim > 1 else 100
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return module


def build(save_taps='exact', out_indices=(0, 1, 2, 3), **side_path):
    """Ours, in train mode, and the stock backbone; both in fp64."""
    ours, stock = e3va_and_stock(
        side_path=dict(save_taps=save_taps, **side_path),
        out_indices=out_indices,
        stock_kwargs=dict(),
    )
    drawn(ours.side_path)
    return ours.double().train(), stock.double()


def image_of(dtype=torch.float64):
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(5)).to(
        dtype
    )


def loss_of(outputs):
    """Weighs every value of every map."""
    generator = torch.Generator().manual_seed(3)
    loss = 0.0
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator)
        loss = loss + (output * noise.to(output.dtype)).mean()
    return loss


def trained(ours):
    return {k: p for k, p in ours.named_parameters() if p.requires_grad}


def gradients(ours, loss, **kwargs):
    """By name; zero for what the loss does not reach."""
    parameters = trained(ours)
    values = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, **kwargs
    )
    return {
        name: torch.zeros_like(p) if value is None else value
        for (name, p), value in zip(parameters.items(), values, strict=True)
    }


def reference_outputs(ours, stock, image, **options):
    """Outputs of the reference and the parameters it has."""
    state = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in ours.named_parameters()
    }
    for i, channels in enumerate(CHANNELS):  # for outputs that are not asked
        state.setdefault(f'norm{i}.weight', torch.ones(channels).double())
        state.setdefault(f'norm{i}.bias', torch.zeros(channels).double())
    outputs = reference.backbone(stock, state, image, **options)
    return [outputs[i] for i in ours.out_indices], state


def reference_gradients(ours, stock, image, used=slice(None), **options):
    outputs, state = reference_outputs(ours, stock, image, **options)
    names = list(trained(ours))
    values = torch.autograd.grad(
        loss_of(outputs[used]),
        [state[name] for name in names],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(state[name]) if value is None else value
        for name, value in zip(names, values, strict=True)
    }


def relative_error(got, expected):
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item() if difference else 0.0


def assert_same(got, expected, bound=1e-10):
    assert got.keys() == expected.keys()
    for name, target in expected.items():
        error = relative_error(got[name], target)
        assert error < bound, (name, error)


def cosine(got, expected):
    return torch.cosine_similarity(
        torch.cat([value.flatten().double() for value in got.values()]),
        torch.cat([value.flatten() for value in expected.values()]),
        dim=0,
    ).item()


OPTIONS = {
    'default': dict(),
    'linear': dict(downsampling='linear'),
    'one tap': dict(taps=('ffn',)),
    'size of the adapters': dict(rank=3, bottleneck_ratio=0.25),
    'frozen norms': dict(train_output_norms=False),
    'no first output': dict(out_indices=(1, 2, 3)),
    'last output': dict(out_indices=(3,)),
    'last output, linear': dict(out_indices=(3,), downsampling='linear'),
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('options', OPTIONS)
def test_gradients_are_those_of_plain_autograd(mode, options):
    options = OPTIONS[options]
    ours, stock = build(mode, **options)
    image = image_of()
    options = {
        k: v for k, v in options.items() if k in ('taps', 'downsampling')
    }
    outputs = ours(image)
    expected, _ = reference_outputs(ours, stock, image, **options)
    for output, target in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, target, rtol=1e-10, atol=1e-10)
    got = gradients(ours, loss_of(outputs))
    expected = reference_gradients(ours, stock, image, **options)
    if mode in EXACT:
        assert_same(got, expected)
    else:
        bound, least = LOSSY[mode]
        assert_same(got, expected, bound)
        assert least < cosine(got, expected) < 1 - 1e-9


@pytest.mark.parametrize('mode', LOSSY)
def test_lossy_taps_leave_what_holds_no_tap_exact(mode):
    """Output norms and last biases, where every stage has a norm."""
    ours, stock = build(mode)
    image = image_of()
    got = gradients(ours, loss_of(ours(image)))
    expected = reference_gradients(ours, stock, image)
    exact = {
        name
        for name in expected
        if name.startswith('norm') or name.endswith('up.bias')
    }
    assert len(exact) == 2 * 4 + 2 * sum(TINY['depths'])
    assert_same(
        {name: got[name] for name in exact},
        {name: expected[name] for name in exact},
    )


def test_each_stage_can_keep_its_taps_in_its_own_way():
    ours, stock = build(['int8', 'recompute', 'exact'])
    image = image_of()
    got = gradients(ours, loss_of(ours(image)))
    expected = reference_gradients(ours, stock, image)
    later = [k for k in got if not k.startswith('side_path.stages.0')]
    assert_same({k: got[k] for k in later}, {k: expected[k] for k in later})
    assert_same(got, expected, LOSSY['int8'][0])
    name = 'side_path.stages.0.0.attn.down.p'
    assert relative_error(got[name], expected[name]) > 1e-4


@pytest.mark.parametrize('mode', EXACT)
def test_fp32_is_within_1e5_of_fp64(mode):
    ours, stock = build(mode)
    expected = reference_gradients(ours, stock, image_of())
    ours.float()
    got = gradients(ours, loss_of(ours(image_of(torch.float32))))
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize('mode', MODES)
def test_the_mode_does_not_change_the_outputs(mode):
    image = image_of()
    for output, expected in zip(
        build(mode)[0](image), build('exact')[0](image), strict=True
    ):
        assert torch.equal(output, expected)


@pytest.mark.parametrize('mode', EXACT)
@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
@pytest.mark.parametrize('used', [slice(3, 4), slice(0, 1), slice(1, 3)])
def test_a_loss_may_use_some_of_the_outputs(mode, downsampling, used):
    ours, stock = build(mode, downsampling=downsampling)
    image = image_of()
    assert_same(
        gradients(ours, loss_of(ours(image)[used])),
        reference_gradients(
            ours, stock, image, used, downsampling=downsampling
        ),
    )


@pytest.mark.parametrize('mode', EXACT)
@pytest.mark.parametrize('weight, bias', [(0.0, 1.0), (1e-3, 1e5)])
def test_norms_that_hide_their_input(mode, weight, bias):
    """Nothing comes back from an output that is all bias."""
    ours, stock = build(mode)
    with torch.no_grad():
        for norm in (ours.norm0, ours.norm2):
            norm.weight[::3], norm.bias[::3] = weight, bias
    image = image_of()
    assert_same(
        gradients(ours, loss_of(ours(image))),
        reference_gradients(ours, stock, image),
        1e-9,
    )


@pytest.mark.parametrize('mode', MODES)
def test_backward_twice_gives_the_same(mode):
    ours, _ = build(mode)
    loss = loss_of(ours(image_of()))
    first = gradients(ours, loss, retain_graph=True)
    second = gradients(ours, loss)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize('mode', EXACT)
def test_backward_in_parts_adds_up(mode):
    """One map after the other, and the last stage alone before."""
    ours, stock = build(mode)
    image = image_of()
    outputs = ours(image)
    last = [p for k, p in trained(ours).items() if '.stages.3.' in k]
    torch.autograd.grad(loss_of(outputs), last, retain_graph=True)
    expected = reference_gradients(ours, stock, image, slice(1, 2))
    got = gradients(ours, loss_of(outputs[1:2]), retain_graph=True)
    assert_same(got, expected)
    expected = reference_gradients(ours, stock, image, slice(3, 4))
    assert_same(gradients(ours, loss_of(outputs[3:])), expected)


@pytest.mark.parametrize('mode', EXACT)
def test_two_forward_passes_before_one_backward(mode):
    ours, stock = build(mode)
    image = image_of()
    images = [image, image.flip(3)[..., 10:]]
    outputs = [ours(picture) for picture in images]
    got = gradients(ours, sum(loss_of(maps) for maps in outputs))
    parts = [reference_gradients(ours, stock, picture) for picture in images]
    assert_same(got, {k: parts[0][k] + parts[1][k] for k in got})


@pytest.mark.parametrize('changed', range(4))
@pytest.mark.parametrize('used', range(4))
def test_an_output_changed_in_place_is_noticed(changed, used):
    """Or the gradients are right: never wrong in silence."""
    ours, stock = build()
    image = image_of()
    outputs = ours(image)
    loss = loss_of(outputs[used : used + 1])
    with torch.no_grad():
        outputs[changed].relu_()
    if changed <= used:
        with pytest.raises(RuntimeError, match='modified by an inplace oper'):
            gradients(ours, loss)
    else:
        assert_same(
            gradients(ours, loss),
            reference_gradients(ours, stock, image, slice(used, used + 1)),
        )


@pytest.mark.parametrize('mode', ['exact', 'int8', 'recompute'])
def test_a_norm_changed_in_place_is_noticed(mode):
    """Also where only the highway of a later stage needs it."""
    ours, _ = build(mode)
    loss = loss_of(ours(image_of())[3:])
    with torch.no_grad():
        ours.norm0.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        gradients(ours, loss)


def test_a_picture_changed_in_place_is_noticed():
    ours, _ = build('recompute')
    image = image_of()
    loss = loss_of(ours(image))
    image.zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        gradients(ours, loss)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('used', [0, 3])
def test_a_gradient_of_the_gradient_is_refused(mode, used):
    ours, _ = build(mode)
    loss = ours(image_of())[used].square().sum()
    name = 'side_path.stages.0.0.attn.down.p'
    (gradient,) = torch.autograd.grad(
        loss, trained(ours)[name], create_graph=True
    )
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def tap_bytes(mode, tokens, channels):
    """Of one tap in fp32; lossy ones keep the projection in 16 bits."""
    projection = 2 * RANK
    statistics = 2 * 4 * channels  # mean and deviation
    of_a_token, once = {
        'exact': (4 * channels, 0),
        'bf16': (2 * channels + projection, 0),
        'int8': (channels + 4 + projection, statistics),
        'int4': (
            channels // 2 + 2 * math.ceil(channels / 128) + projection,
            statistics,
        ),
        'recompute': (0, 0),
    }[mode]
    return tokens * of_a_token + once


def norm_bytes(tokens, channels, last=False):
    """Map and deviation, and the mean, which the next stage alone needs."""
    return 4 * tokens * (channels + 1 + (not last))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('size', [(51, 75), (40, 56)])
def test_bytes_kept_for_backward(mode, batch, size):
    """Beside the picture, which a training step holds anyway."""
    ours, _ = build(mode)
    kept = 0
    for stage, (channels, depth) in enumerate(
        zip(CHANNELS, TINY['depths'], strict=True)
    ):
        stride = 4 * 2**stage
        tokens = batch * math.prod(math.ceil(side / stride) for side in size)
        kept += 2 * depth * tap_bytes(mode, tokens, channels)
        kept += norm_bytes(tokens, channels, last=stage == 3)
    image = torch.randn(batch, 3, *size)
    assert kept_for_backward(ours.float(), image) == kept


@pytest.mark.parametrize(
    'mode, of_a_token, once',
    [
        ('exact', 4 * 32, 0),
        ('bf16', 2 * 32, 0),
        ('int8', 36, 8 * 32),
        ('recompute', 4 * 32, 0),
    ],
)
def test_bytes_kept_without_the_first_output(mode, of_a_token, once):
    """The sum that the downsampling needs is kept as taps are."""
    ours, _ = build(mode, out_indices=(1,))
    kept = 0
    for stage in (0, 1):
        tokens = 2 * math.prod(GRIDS[stage])
        depth, channels = TINY['depths'][stage], CHANNELS[stage]
        kept += 2 * depth * tap_bytes(mode, tokens, channels)
    kept += 2 * math.prod(GRIDS[0]) * of_a_token + once
    kept += norm_bytes(2 * math.prod(GRIDS[1]), CHANNELS[1], last=True)
    assert kept_for_backward(ours.float(), torch.randn(IMAGE)) == kept


def test_linear_downsampling_keeps_neither_sum_nor_mean_nor_weights():
    ours, _ = build(downsampling='linear')
    kept = sum(
        2 * depth * tap_bytes('exact', 2 * math.prod(grid), channels)
        + norm_bytes(2 * math.prod(grid), channels, last=True)
        for grid, channels, depth in zip(
            GRIDS, CHANNELS, TINY['depths'], strict=True
        )
    )
    assert kept_for_backward(ours.float(), torch.randn(IMAGE)) == kept


@pytest.mark.parametrize('mode', MODES)
def test_nothing_is_kept_without_gradients(mode):
    ours, _ = build(mode)
    image = image_of()
    given = [image, *ours.parameters(), *ours.buffers()]
    with torch.no_grad(), LiveBytes(given) as count:
        outputs = ours(image)
        gc.collect()
        assert count.by_place()[''] == sum(o.nbytes for o in outputs)
        assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize('mode', MODES)
def test_backward_leaves_nothing_behind(mode):
    """Taps that came again are gone, though the graph may be used again."""
    ours, _ = build(mode)
    image = image_of()
    given = [image, *ours.parameters(), *ours.buffers()]
    with LiveBytes(given) as count:
        before = count.live
        loss = loss_of(ours(image))
        gc.collect()
        kept = count.live
        gradients(ours, loss, retain_graph=True)
        gc.collect()
        assert count.live == kept > before
        del loss
        gc.collect()
        assert count.live == before


@pytest.mark.parametrize('mode', MODES)
def test_the_picture_is_kept_by_those_who_need_it(mode):
    ours, _ = build(mode)
    image = image_of()
    loss = loss_of(ours(image))
    kept = weakref.ref(image)
    del image
    gc.collect()
    assert (kept() is not None) == (mode == 'recompute')
    gradients(ours, loss)
    gc.collect()
    assert kept() is None
