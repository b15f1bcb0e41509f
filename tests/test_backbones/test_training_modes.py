"""The backbone under what training is run with, whatever it keeps.

Distributed training has a file of its own.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from e3va_mm.engine.checkpointing import checkpoint_modules
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from tests.helpers import build_e3va, e3va_and_stock
from tests.reference import e3va as reference

MODES = list(TAP_CODECS)
SHALLOW = dict(depths=(1, 1, 1, 1))
HALVES = [torch.bfloat16, torch.float16]


def drawn(ours, seed=1):
    """Adapters that give a highway as large as the trunk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.side_path.parameters():
            fan_in = len(parameter) if parameter.ndim > 1 else 100
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return ours.train()


def build(mode, **kwargs):
    ours, stock = e3va_and_stock(
        side_path=dict(save_taps=mode),
        stock_kwargs=dict(SHALLOW, **kwargs),
    )
    return drawn(ours), stock


def images(count=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 51, 75, generator=generator)


def loss_of(outputs):
    """Weighs every value of every map; a mean over the pictures."""
    loss = 0.0
    for output in outputs:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(output.shape[1:], generator=generator)
        loss = loss + (output.float() * noise).mean()
    return loss


def taken(model):
    """Gradients by name, removed from the parameters."""
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    assert gradients
    return gradients


def gradients(model, pictures):
    loss_of(model(pictures)).backward()
    return taken(model)


def relative_error(got, expected):
    """Of all gradients as one vector."""
    assert got.keys() == expected.keys()
    total = sum((got[k].double() - expected[k]).square().sum() for k in got)
    norm = sum(value.double().square().sum() for value in expected.values())
    return (total / norm).sqrt().item()


def assert_same(got, expected, bound=1e-6):
    assert got.keys() == expected.keys()
    for name, target in expected.items():
        error = (got[name] - target).norm() / target.norm()
        assert error <= bound, (name, error)


@pytest.mark.parametrize('dtype', HALVES)
def test_exact_under_autocast_is_as_good_as_plain_autograd(dtype):
    """Both are rounded; ours must not be rounded more."""
    ours, stock = build('exact')
    pictures = images()
    with torch.autocast('cpu', dtype=dtype):
        outputs = ours(pictures)
        assert all(output.dtype == dtype for output in outputs)
    loss_of(outputs).backward()
    got = taken(ours)
    assert all(value.dtype == torch.float32 for value in got.values())

    def plain(stock, dtype):
        state = {
            name: parameter.detach().to(dtype).requires_grad_()
            for name, parameter in ours.named_parameters()
            if parameter.requires_grad
        }
        outputs = reference.backbone(stock, state, pictures.to(dtype))
        loss = sum(
            (output * noise).mean()
            for output, noise in zip(outputs, noises(outputs), strict=True)
        )
        return dict(
            zip(
                state,
                torch.autograd.grad(loss, list(state.values())),
                strict=True,
            )
        )

    def noises(outputs):
        for output in outputs:
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(output.shape[1:], generator=generator)
            yield noise.to(output.dtype)

    with torch.autocast('cpu', dtype=dtype):
        rounded = plain(stock, torch.float32)
    expected = plain(copy.deepcopy(stock).double(), torch.float64)
    assert 1e-5 < relative_error(rounded, expected) < 0.1
    assert relative_error(got, expected) < 1.5 * relative_error(
        rounded, expected
    )


# Beside the rounding of autocast: int8 loses less, int4 more.
UNDER_AUTOCAST = {'int4': 0.2}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', HALVES)
def test_every_mode_under_autocast(mode, dtype):
    ours, _ = build(mode)
    expected = gradients(build('exact')[0], images())
    with torch.autocast('cpu', dtype=dtype):
        loss = loss_of(ours(images()))
    loss.backward()
    outside = taken(ours)
    bound = UNDER_AUTOCAST.get(mode, 0.03)
    assert relative_error(outside, expected) < bound
    # Some call backward inside too.
    with torch.autocast('cpu', dtype=dtype):
        loss_of(ours(images())).backward()
    assert relative_error(taken(ours), expected) < bound


def test_recompute_runs_the_trunk_as_it_ran():
    """Backward is not under the autocast of the forward pass."""
    found = []
    for mode in ('recompute', 'exact'):
        ours, _ = build(mode)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = loss_of(ours(images()))
        loss.backward()
        found.append(taken(ours))
    assert_same(*found, 0)


def cpu_scaler(**kwargs):
    if not hasattr(torch.amp, 'GradScaler'):  # torch < 2.3
        pytest.skip('this torch has no scaler for CPU')
    return torch.amp.GradScaler('cpu', **kwargs)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', HALVES)
def test_scaled_gradients_are_the_same(mode, dtype):
    ours, _ = build(mode)

    def loss():
        with torch.autocast('cpu', dtype=dtype):
            return loss_of(ours(images()))

    # As large as float16 takes them: nothing vanishes.
    scaler = cpu_scaler(init_scale=2.0**10)
    optimizer = torch.optim.SGD(ours.side_path.parameters(), lr=0.1)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    got = {k: v for k, v in taken(ours).items() if 'side_path' in k}
    loss().backward()
    expected = {k: v for k, v in taken(ours).items() if 'side_path' in k}
    bound = 1e-6 if dtype == torch.bfloat16 else 2e-2
    assert relative_error(got, expected) < bound


@pytest.mark.parametrize('mode', MODES)
def test_overflow_is_seen_by_the_scaler(mode):
    """The step is left out, the scale goes down, and training goes on."""
    ours, _ = build(mode)
    scaler = cpu_scaler(init_scale=2.0**60, backoff_factor=2.0**-55)
    optimizer = torch.optim.SGD(ours.side_path.parameters(), lr=0.1)
    before = copy.deepcopy(ours.side_path.state_dict())
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=torch.float16):
            loss = loss_of(ours(images()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(
            any(
                not torch.equal(value, before[name])
                for name, value in ours.side_path.state_dict().items()
            )
        )
    assert moved == [False, True]
    assert all(p.isfinite().all() for p in ours.side_path.parameters())


@pytest.mark.parametrize('mode', MODES)
def test_accumulated_gradients_are_those_of_the_whole_batch(mode):
    ours, _ = build(mode)
    expected = gradients(ours, images(4))
    for part in images(4).split(2):
        (loss_of(ours(part)) / 2).backward()
    # Channels are standardised over the pictures of a pass.
    bound = {'int8': 5e-3, 'int4': 5e-2}.get(mode, 1e-5)
    assert_same(taken(ours), expected, bound)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_non_reentrant_checkpointing_changes_nothing(mode, dtype):
    ours, _ = build(mode)

    def run(function):
        with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
            loss = loss_of(function(images()))
        loss.backward()
        return taken(ours)

    expected = run(ours)
    got = run(lambda x: checkpoint(ours, x, use_reentrant=False))
    assert_same(got, expected, 0)


@pytest.mark.parametrize('mode', MODES)
def test_as_a_checkpointed_module(mode):
    ours, _ = build(mode)
    model = torch.nn.Sequential(ours)
    expected = gradients(model, images())
    checkpoint_modules(model, ['0'])
    assert_same(gradients(model, images()), expected, 0)


@pytest.mark.parametrize('mode', ['exact', 'int8', 'recompute'])
def test_compiled(mode):
    """Graph breaks are fine, other gradients are not."""
    torch._dynamo.reset()
    counters.clear()
    ours = build_e3va(
        side_path=dict(save_taps=mode),
        depths=(1, 1),
        num_heads=(1, 2),
        strides=(4, 2),
        out_indices=(1,),
    )
    ours.init_weights()
    drawn(ours)
    picture = images(1)[..., :32, :32].contiguous()
    expected = gradients(ours, picture)
    compiled = torch.compile(ours, backend='aot_eager', dynamic=False)
    loss_of(compiled(picture)).backward()
    assert_same(taken(ours), expected, 1e-5)
    assert counters['stats']['unique_graphs'] > 1, 'nothing was compiled'
    torch._dynamo.reset()
