"""Gradients of a whole backbone, whatever is kept for backward.

The reference is plain autograd in plain torch, in fp64.
"""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from e3va_mm.measure import LiveBytes, kept_for_backward
from tests.helpers import TINY, build_e3va, e3va_and_stock
from tests.reference import e3va as reference

# Two images of odd sizes: padding in windows and in patch merging.
SIZE = (51, 75)
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
every_mode = pytest.mark.parametrize('mode', MODES)
exact_modes = pytest.mark.parametrize('mode', EXACT)
SHALLOW = dict(depths=(1, 1, 1, 1))
CHANGED = 'modified by an inplace operation'


def drawn(module, seed=1):
    """Adapters that give a highway as large as the trunk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = len(parameter) if parameter.ndim > 1 else 100
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return module


def build(mode='exact', stock_kwargs=None, out_indices=(0, 1, 2, 3), **tuner):
    """Ours, in train mode, and the stock backbone."""
    ours, stock = e3va_and_stock(
        tuner=dict(save_taps=mode, **tuner),
        out_indices=out_indices,
        stock_kwargs=stock_kwargs,
    )
    drawn(ours.side_path)
    return ours.train(), stock


def build_fp64(*args, **kwargs):
    ours, stock = build(*args, **kwargs)
    return ours.double(), stock.double()


def images(dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, *SIZE, generator=generator).to(dtype)


def loss_of(outputs):
    """Weighs every value of every map; a mean over the images."""
    generator = torch.Generator().manual_seed(3)
    loss = 0.0
    for output in outputs:
        noise = torch.randn(output.shape[1:], generator=generator)
        dtype = torch.promote_types(output.dtype, torch.float32)
        loss = loss + (output.to(dtype) * noise).mean()
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


def taken(model):
    """Gradients by name, removed from the parameters."""
    found = {k: p.grad for k, p in trained(model).items()}
    model.zero_grad(set_to_none=True)
    return found


def expect(ours, stock, image, used=slice(None), **options):
    """Outputs and gradients of the reference."""
    state = {
        name: value.detach().clone().to(image.dtype)
        for name, value in ours.named_parameters()
    }
    for name in trained(ours):
        state[name].requires_grad_()
    for i, channels in enumerate(CHANNELS):  # for outputs that are not asked
        state.setdefault(f'norm{i}.weight', torch.ones(channels).to(image))
        state.setdefault(f'norm{i}.bias', torch.zeros(channels).to(image))
    outputs = reference.backbone(stock, state, image, **options)
    outputs = [outputs[i] for i in ours.out_indices]
    names = list(trained(ours))
    values = torch.autograd.grad(
        loss_of(outputs[used]),
        [state[name] for name in names],
        allow_unused=True,
    )
    return outputs, {
        name: torch.zeros_like(state[name]) if value is None else value
        for name, value in zip(names, values, strict=True)
    }


def relative_error(got, expected):
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item() if difference else 0.0


def error_of_all(got, expected):
    """Of all gradients as one vector."""
    assert got.keys() == expected.keys()
    return relative_error(
        torch.cat([value.flatten() for value in got.values()]),
        torch.cat([value.flatten() for value in expected.values()]).double(),
    )


def assert_same(got, expected, bound=1e-10):
    assert got.keys() == expected.keys()
    for name, target in expected.items():
        error = relative_error(got[name], target)
        assert error <= bound, (name, error)


# -- values ------------------------------------------------------------------


@pytest.mark.parametrize(
    'mode, options',
    [
        *((mode, {}) for mode in MODES),
        *((mode, dict(downsampling='linear')) for mode in MODES),
        ('int8', dict(taps=('ffn',))),
        ('exact', dict(taps=('ffn',), rank=3, bottleneck_ratio=0.25)),
        ('int4', dict(train_output_norms=False)),
        ('exact', dict(out_indices=(1, 2, 3))),
        ('bf16', dict(out_indices=(1, 2, 3))),
        *((mode, dict(out_indices=(3,))) for mode in MODES),
        ('recompute', dict(out_indices=(3,), downsampling='linear')),
    ],
)
def test_gradients_are_those_of_plain_autograd(mode, options):
    ours, stock = build_fp64(mode, **options)
    options = {
        k: v for k, v in options.items() if k in ('taps', 'downsampling')
    }
    outputs = ours(images())
    targets, expected = expect(ours, stock, images(), **options)
    # The mode does not change the outputs.
    for output, target in zip(outputs, targets, strict=True):
        torch.testing.assert_close(output, target, rtol=1e-10, atol=1e-10)
    got = gradients(ours, loss_of(outputs))
    if mode in EXACT:
        assert_same(got, expected)
        return
    bound, least = LOSSY[mode]
    assert_same(got, expected, bound)
    cosine = torch.cosine_similarity(
        torch.cat([value.flatten() for value in got.values()]),
        torch.cat([value.flatten() for value in expected.values()]),
        dim=0,
    )
    assert least < cosine < 1 - 1e-9
    if len(outputs) == 4 and any(k.startswith('norm') for k in got):
        # Where each stage has a norm, what holds no tap is exact.
        exact = [k for k in got if k.startswith('norm') or 'up.bias' in k]
        assert_same(
            {k: got[k] for k in exact}, {k: expected[k] for k in exact}
        )


def test_each_stage_can_keep_its_taps_in_its_own_way():
    ours, stock = build_fp64(['int8', 'recompute', 'exact'])
    got = gradients(ours, loss_of(ours(images())))
    _, expected = expect(ours, stock, images())
    later = [k for k in got if not k.startswith('side_path.stages.0')]
    assert_same({k: got[k] for k in later}, {k: expected[k] for k in later})
    assert_same(got, expected, LOSSY['int8'][0])
    name = 'side_path.stages.0.down.p'
    assert relative_error(got[name], expected[name]) > 1e-5


@exact_modes
def test_fp32_is_within_1e5_of_fp64(mode):
    ours, stock = build_fp64(mode)
    _, expected = expect(ours, stock, images())
    ours.float()
    assert_same(
        gradients(ours, loss_of(ours(images(torch.float32)))), expected, 1e-5
    )


@exact_modes
@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
def test_a_loss_may_use_some_of_the_outputs(mode, downsampling):
    """And backward may come in parts, or twice."""
    ours, stock = build_fp64(mode, downsampling=downsampling)
    outputs = ours(images())
    last = [p for k, p in trained(ours).items() if '.stages.3.' in k]
    torch.autograd.grad(loss_of(outputs), last, retain_graph=True)
    for used in (slice(3, 4), slice(0, 1), slice(1, 3)):
        _, expected = expect(
            ours, stock, images(), used, downsampling=downsampling
        )
        for _ in range(2):
            got = gradients(ours, loss_of(outputs[used]), retain_graph=True)
            assert_same(got, expected)


@exact_modes
@pytest.mark.parametrize('weight, bias', [(0.0, 1.0), (1e-3, 1e5)])
def test_norms_that_hide_their_input(mode, weight, bias):
    """Nothing comes back from an output that is all bias."""
    ours, stock = build_fp64(mode)
    with torch.no_grad():
        for norm in (ours.norm0, ours.norm2):
            norm.weight[::3], norm.bias[::3] = weight, bias
    got = gradients(ours, loss_of(ours(images())))
    assert_same(got, expect(ours, stock, images())[1], 1e-9)


@exact_modes
def test_two_forward_passes_before_one_backward(mode):
    ours, stock = build_fp64(mode)
    both = [images(), images().flip(3)[..., 10:]]
    got = gradients(ours, sum([loss_of(o) for o in map(ours, both)]))
    parts = [expect(ours, stock, image)[1] for image in both]
    assert_same(got, {k: parts[0][k] + parts[1][k] for k in got})


@pytest.mark.parametrize('used', range(4))
def test_an_output_changed_in_place_is_noticed(used):
    """Or the gradients are right: never wrong in silence."""
    ours, stock = build_fp64(stock_kwargs=SHALLOW)
    _, expected = expect(ours, stock, images(), slice(used, used + 1))
    for changed in range(4):
        outputs = ours(images())
        loss = loss_of(outputs[used : used + 1])
        with torch.no_grad():
            outputs[changed].relu_()
        if changed <= used:
            with pytest.raises(RuntimeError, match=CHANGED):
                gradients(ours, loss)
        else:
            assert_same(gradients(ours, loss), expected)


@pytest.mark.parametrize('mode', ['exact', 'int8', 'recompute'])
def test_a_norm_or_an_image_changed_in_place_is_noticed(mode):
    """Also where only the highway of a later stage needs it."""
    ours, _ = build(mode, SHALLOW)
    loss = loss_of(ours(images(torch.float32))[3:])
    with torch.no_grad():
        ours.norm0.weight.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        gradients(ours, loss)
    if mode == 'recompute':
        image = images(torch.float32)
        loss = loss_of(ours(image))
        image.zero_()
        with pytest.raises(RuntimeError, match=CHANGED):
            gradients(ours, loss)


@every_mode
@pytest.mark.parametrize('used', [0, 3])
def test_a_gradient_of_the_gradient_is_refused(mode, used):
    ours, _ = build(mode, SHALLOW)
    loss = ours(images(torch.float32))[used].square().sum()
    first = trained(ours)['side_path.stages.0.down.p']
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


# -- bytes -------------------------------------------------------------------


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


@every_mode
@pytest.mark.parametrize('batch, size', [(1, SIZE), (2, (40, 56))])
def test_bytes_kept_for_backward(mode, batch, size):
    """Beside the image, which a training step holds anyway."""
    ours, _ = build(mode)
    kept = 0
    for stage, (channels, depth) in enumerate(
        zip(CHANNELS, TINY['depths'], strict=True)
    ):
        stride = 4 * 2**stage
        tokens = batch * math.prod(math.ceil(side / stride) for side in size)
        kept += 2 * depth * tap_bytes(mode, tokens, channels)
        kept += norm_bytes(tokens, channels, last=stage == 3)
    assert kept_for_backward(ours, torch.randn(batch, 3, *size)) == kept


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
    assert kept_for_backward(ours, images(torch.float32)) == kept


def test_linear_downsampling_keeps_neither_sum_nor_mean_nor_weights():
    ours, _ = build(downsampling='linear')
    kept = sum(
        2 * depth * tap_bytes('exact', 2 * math.prod(grid), channels)
        + norm_bytes(2 * math.prod(grid), channels, last=True)
        for grid, channels, depth in zip(
            GRIDS, CHANNELS, TINY['depths'], strict=True
        )
    )
    assert kept_for_backward(ours, images(torch.float32)) == kept


@every_mode
def test_nothing_is_left_behind(mode):
    """Not without gradients, nor by backward, nor the image itself."""
    ours, _ = build(mode, SHALLOW)
    image = images(torch.float32)
    held = [image, *ours.parameters(), *ours.buffers()]
    with torch.no_grad(), LiveBytes(held) as count:
        outputs = ours(image)
        gc.collect()
        assert count.by_place()[''] == sum(o.nbytes for o in outputs)
        assert not any(output.requires_grad for output in outputs)
    del outputs
    with LiveBytes(held) as count:
        before = count.live
        loss = loss_of(ours(image))
        gc.collect()
        kept = count.live
        # Taps that came again are gone, though the graph may be used again.
        gradients(ours, loss, retain_graph=True)
        gc.collect()
        assert count.live == kept > before
        del loss
        gc.collect()
        assert count.live == before
    loss = loss_of(ours(image))
    reference = weakref.ref(image)
    del image, held, count
    gc.collect()
    assert (reference() is not None) == (mode == 'recompute')
    gradients(ours, loss)
    gc.collect()
    assert reference() is None


# -- what training is run with -----------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize('dtype', HALVES)


def run(ours, image, dtype=None, function=None):
    """Gradients of a step, forward under an autocast."""
    with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
        loss = loss_of((ours if function is None else function)(image))
    loss.backward()
    return taken(ours)


@every_half
def test_exact_under_autocast_is_as_good_as_plain_autograd(dtype):
    """Both are rounded; ours must not be rounded more."""
    ours, stock = build(stock_kwargs=SHALLOW)
    image = images(torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        outputs = ours(image)
        _, rounded = expect(ours, stock, image)
    assert {output.dtype for output in outputs} == {dtype}
    got = gradients(ours, loss_of(outputs))
    assert {value.dtype for value in got.values()} == {torch.float32}
    _, expected = expect(ours, copy.deepcopy(stock).double(), images())
    plain = error_of_all(rounded, expected)
    assert 1e-5 < plain < 0.1
    assert error_of_all(got, expected) < 1.5 * plain


@every_mode
@every_half
def test_every_mode_under_autocast_and_a_loss_scale(mode, dtype):
    ours, _ = build(mode, SHALLOW)
    image = images(torch.float32)
    expected = run(build(stock_kwargs=SHALLOW)[0], image)
    got = run(ours, image, dtype)
    # Beside the rounding of autocast: int8 loses less, int4 more.
    bound = 0.2 if mode == 'int4' else 0.03
    assert error_of_all(got, expected) < bound
    # Some call backward inside too.
    with torch.autocast('cpu', dtype=dtype):
        loss_of(ours(image)).backward()
    assert error_of_all(taken(ours), expected) < bound
    # As large as float16 takes them: nothing vanishes.
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    optimizer = torch.optim.SGD(trained(ours).values(), lr=0.1)
    with torch.autocast('cpu', dtype=dtype):
        loss = loss_of(ours(image))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    bound = 1e-6 if dtype == torch.bfloat16 else 2e-2
    assert error_of_all(taken(ours), got) < bound


@every_half
def test_a_small_highway_is_inherited_well_under_autocast(dtype):
    """The difference is taken before rounding: no cancellation."""
    ours, _ = build()
    for name, parameter in ours.side_path.named_parameters():
        if name.endswith('up.q'):
            torch.nn.init.normal_(parameter, std=1e-3)
    found = []
    inherit = ours.side_path.inherit

    def watched(*args):
        found.append(inherit(*args))
        return found[-1]

    ours.side_path.inherit = watched
    with torch.no_grad():
        ours(images(torch.float32))
        with torch.autocast('cpu', dtype=dtype):
            ours(images(torch.float32))
    assert len(found) == 2 * 3
    for full, low in zip(found[:3], found[3:], strict=True):
        assert full.abs().max() > 0
        assert (low.float() - full).norm() < 0.05 * full.norm()


def test_recompute_runs_the_trunk_as_it_ran():
    """Backward is not under the autocast of the forward pass."""
    image = images(torch.float32)
    got, expected = (
        run(build(mode, SHALLOW)[0], image, torch.bfloat16)
        for mode in ('recompute', 'exact')
    )
    assert_same(got, expected, 0)


@every_mode
def test_overflow_is_seen_by_the_scaler(mode):
    """The step is left out, the scale goes down, and training goes on."""
    ours, _ = build(mode, SHALLOW)
    scaler = torch.amp.GradScaler(
        'cpu', init_scale=2.0**60, backoff_factor=2.0**-55
    )
    optimizer = torch.optim.SGD(ours.side_path.parameters(), lr=0.1)
    before = torch.cat([p.flatten() for p in ours.side_path.parameters()])
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=torch.float16):
            loss = loss_of(ours(images(torch.float32)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = torch.cat([p.flatten() for p in ours.side_path.parameters()])
        moved.append(not torch.equal(after, before))
    assert moved == [False, True]
    assert after.isfinite().all()


@every_mode
def test_accumulated_gradients_are_those_of_the_whole_batch(mode):
    ours, _ = build(mode, SHALLOW)
    expected = run(ours, images(torch.float32, 4))
    for part in images(torch.float32, 4).split(2):
        (loss_of(ours(part)) / 2).backward()
    # Channels are standardised over the images of a pass.
    bound = {'int8': 5e-3, 'int4': 5e-2}.get(mode, 1e-5)
    assert_same(taken(ours), expected, bound)


@every_mode
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_non_reentrant_checkpointing_changes_nothing(mode, dtype):
    ours, _ = build(mode, SHALLOW)
    image = images(torch.float32)
    expected = run(ours, image, dtype)
    got = run(
        ours, image, dtype, lambda x: checkpoint(ours, x, use_reentrant=False)
    )
    assert_same(got, expected, 0)


def test_compiled():
    """Graph breaks are fine, other gradients are not."""
    torch._dynamo.reset()
    counters.clear()
    two = dict(depths=(1, 1), num_heads=(1, 2), strides=(4, 2))
    tuner = dict(save_taps=['recompute', 'int8'])
    ours = build_e3va(tuner=tuner, out_indices=(1,), **two)
    drawn(ours.side_path)
    image = images(torch.float32, 1)[..., :32, :32].contiguous()
    expected = run(ours.train(), image)
    compiled = torch.compile(ours, backend='aot_eager', dynamic=False)
    assert_same(run(ours, image, function=compiled), expected, 1e-5)
    assert counters['stats']['unique_graphs'] > 1, 'nothing was compiled'
    torch._dynamo.reset()
