"""Running a stock trunk and reading it."""

import copy

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import StageSpec, TrunkOptions, build_trunk
from tests.helpers import build_stock, e3va_and_stock, randomised
from tests.trunk_cases import build_ours

TAPS = ('attn', 'ffn')


@pytest.fixture(scope='module')
def pair():
    """A tuned Swin and the stock one."""
    return e3va_and_stock()


def with_options(ours, **options):
    """A copy whose trunk computes in another way."""
    ours = copy.deepcopy(ours)
    ours.trunk.options = TrunkOptions(**options)
    ours.trunk.install_kernels()
    return ours


def run(ours, image, autocast=None):
    """End and taps of each stage of the trunk."""
    taps, ends = {stage: [] for stage in range(4)}, []
    with (
        torch.no_grad(),
        torch.autocast('cpu', autocast, enabled=autocast is not None),
    ):
        ours.trunk.run(
            image,
            3,
            TAPS,
            lambda stage, block, tap, value: taps[stage].append(value),
            lambda stage, end: ends.append(end.tokens),
        )
    return ends, taps


def test_stages(pair):
    assert pair[0].trunk.stages() == [
        StageSpec(32 * 2**i, depth, TAPS)
        for i, depth in enumerate((2, 1, 2, 1))
    ]


def test_names_and_weights_stay_the_stock_ones():
    stock = randomised(build_stock())
    names = list(stock.state_dict())
    pointers = [p.data_ptr() for p in stock.parameters()]
    build_trunk(stock, TrunkOptions()).install_kernels()
    assert list(stock.state_dict()) == names
    assert [p.data_ptr() for p in stock.parameters()] == pointers


def test_hooks_are_gone_after_a_run_even_if_it_fails(pair):
    def fail(*tap):
        raise RuntimeError('on purpose')

    ours, _ = pair
    with pytest.raises(RuntimeError, match='on purpose'):
        ours.trunk.run(torch.randn(1, 3, 32, 32), 3, ('ffn',), fail)
    assert not any(m._forward_hooks for m in ours.stages.modules())
    assert ours.out_indices == (0, 1, 2, 3)


@pytest.mark.parametrize('out_indices', [(), (4,), (-1,), (True,), ('a',)])
def test_outputs_that_are_not_there(out_indices):
    stock = build_stock()
    stock.out_indices = out_indices
    with pytest.raises(ConfigError, match='should name some of its 4 stages'):
        build_trunk(stock, TrunkOptions())


def test_an_image_that_gives_no_grid():
    ours = build_ours('timm vit')
    ours.trunk.layout = copy.copy(ours.trunk.layout)
    object.__setattr__(ours.trunk.layout, 'extra_tokens', None)
    with pytest.raises(ConfigError, match='name their number in `layout.ext'):
        ours(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    'compute, autocast, bound',
    [
        ('bf16', None, 2e-2),
        ('fp16', None, 3e-3),
        (None, torch.bfloat16, 2e-2),
        ('fp16', torch.bfloat16, 3e-3),
    ],
)
def test_compute_types_are_close_and_the_stream_stays_in_fp32(
    pair, compute, autocast, bound
):
    """bf16 rounds to 2 ** -9, fp16 to 2 ** -12, and some of that is seen."""
    image = torch.randn(1, 3, 101, 75)
    expected, _ = run(pair[0], image)
    ours = with_options(pair[0], compute=compute)
    normed = set()
    for module in ours.stages.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(
                lambda _, args, out: normed.update((args[0].dtype, out.dtype))
            )
    ends, taps = run(ours, image, autocast)
    errors = [
        float((a - b).norm() / b.norm())
        for a, b in zip(ends, expected, strict=True)
    ]
    assert max(errors) < bound
    assert errors[-1] > bound / 100
    # Branches have the compute type; sums and norms never.
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16)
    found = {tap.dtype for of in taps.values() for tap in of}
    assert found == {dtypes.get(compute, autocast)}
    assert {end.dtype for end in ends} == normed == {torch.float32}


def test_single_precision_holds_under_autocast(pair):
    ours = with_options(pair[0], compute='fp32')
    image = torch.randn(1, 3, 64, 64)
    for one, other in zip(
        run(ours, image, torch.bfloat16)[0], run(ours, image)[0], strict=True
    ):
        assert torch.equal(one, other)
