"""The side path over a trunk of numbers: it knows no backbone."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.models import E3VASidePath
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Downsampling, StageSpec
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS

STAGES = [
    StageSpec(8, 2, ('left', 'right')),
    StageSpec(16, 1, ('left', 'right')),
]


def drawn(**kwargs):
    side = E3VASidePath(STAGES, rank=2, **kwargs)
    for parameter in side.parameters():
        torch.nn.init.normal_(parameter)
    return side


def test_taps_add_up_in_parallel():
    side = drawn()
    taps = torch.randn(4, 1, 3, 8)
    highway = side.start(0, None)
    for (block, tap), value in zip(
        [(0, 'left'), (0, 'right'), (1, 'left'), (1, 'right')],
        taps,
        strict=True,
    ):
        side.add_tap(highway, 0, block, tap, value)
    expected = sum(
        side.stages[0][block][tap](value)
        for (block, tap), value in zip(
            [(0, 'left'), (0, 'right'), (1, 'left'), (1, 'right')],
            taps,
            strict=True,
        )
    )
    torch.testing.assert_close(highway.sum(), expected)
    trunk = torch.randn(1, 3, 8)
    torch.testing.assert_close(
        side.output(highway, trunk, (1, 3)), trunk + expected
    )
    assert side.output(side.start(0, None), trunk, (1, 3)) is trunk


def gather(tokens, norm=True):
    return torch.nn.functional.layer_norm(tokens, (8,)) if norm else tokens


WEIGHT = torch.randn(16, 8)


def project(gathered):
    """(B, L, 8) -> (B, L, 16)."""
    return gathered @ WEIGHT.T


def test_both_forms_of_inheritance_keep_zero_at_zero():
    trunk, base = torch.randn(2, 1, 3, 8)
    downsampling = Downsampling(gather, lambda: WEIGHT)
    for form, expected in [
        ('difference', project(gather(trunk + base)) - project(gather(trunk))),
        ('linear', project(base)),
    ]:
        side = drawn(downsampling=form)
        zero = side.start(0, torch.zeros_like(trunk))
        assert not side.inherit(zero, trunk, trunk, downsampling).any()
        begun = side.start(0, base)
        torch.testing.assert_close(
            side.inherit(begun, trunk + base, trunk, downsampling), expected
        )
        nothing = side.start(0, None)
        assert side.inherit(nothing, trunk, trunk, downsampling) is None


def test_only_the_taps_asked_for_have_adapters():
    side = E3VASidePath(STAGES, rank=2, taps=('right',))
    assert [list(block) for block in side.stages[0]] == [['right']] * 2


def test_another_kind_of_side_path_can_be_registered():
    from tests.helpers import build_e3va

    @MODELS.register_module(force=True)
    class SilentSidePath(E3VASidePath):
        def output(self, highway, trunk, size):
            return trunk + 0 * highway.sum()

    backbone = build_e3va(side_path=dict(type='e3va_mm.SilentSidePath'))
    assert type(backbone.side_path) is SilentSidePath
    backbone(torch.randn(1, 3, 64, 64))[0].sum().backward()
    assert not backbone.side_path.stages[0][0]['attn'].up.q.grad.any()


@pytest.mark.parametrize('taps', [['left'], ('left', 'right')])
def test_taps_are_named_by_lists_too(taps):
    assert E3VASidePath(STAGES, rank=2, taps=taps).taps == tuple(taps)


def bytes_kept(function):
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    'form, save_taps, of_a_token, once',
    [
        ('difference', 'exact', 4 * 8, 0),
        ('difference', 'recompute', 4 * 8, 0),
        ('difference', 'bf16', 2 * 8, 0),
        ('difference', 'int8', 8 + 4, 8 * 8),
        ('difference', ('recompute', 'int8'), 8 + 4, 8 * 8),
        ('linear', 'exact', 0, 0),
    ],
)
def test_inheritance_keeps_the_sum_as_taps_are_kept(
    form, save_taps, of_a_token, once
):
    """Where no output norm has kept it, and where it is needed at all."""
    side = drawn(downsampling=form, save_taps=save_taps)
    trunk, base = torch.randn(2, 1, 30, 8)
    total = (trunk + base).requires_grad_()
    kept = bytes_kept(
        lambda: side.inherit(
            side.start(0, total),
            total,
            trunk,
            Downsampling(gather, lambda: WEIGHT),
        )
    )
    assert kept == 30 * of_a_token + once


@pytest.mark.parametrize(
    'save_taps, expected',
    [
        ('int8', ['int8', 'int8']),
        (['int8', 'exact'], ['int8', 'exact']),
        (('bf16',), ['bf16', 'bf16']),
        (['recompute', 'int8', 'int4', 'bf16'], ['recompute', 'int8']),
    ],
)
def test_each_stage_can_keep_its_taps_in_its_own_way(save_taps, expected):
    side = E3VASidePath(STAGES, rank=2, save_taps=save_taps)
    for stage, mode in enumerate(expected):
        assert side.start(stage, None).codec is TAP_CODECS[mode]


@pytest.mark.parametrize('compute', [None, 'fp32', 'bf16', 'fp16'])
def test_adapters_compute_in_the_type_asked_for(compute):
    side = E3VASidePath(STAGES, rank=2, compute=compute)
    assert side.start(0, None).compute == DTYPES.get(compute)


WAYS = (
    r"`side_path.save_taps` should be one of \('exact', 'bf16'.*"
    'or one for each stage, but got'
)
TYPES = (
    r"`side_path.compute` should be one of \(None, 'fp32', 'bf16', "
    r"'fp16'\), but got "
)


@pytest.mark.parametrize(
    'option, value, text',
    [
        *(
            ('save_taps', value, WAYS)
            for value in ('fp4', [], ['exact', 'fp4'], None, [['exact']])
        ),
        *(('compute', value, TYPES) for value in ('int8', 16, torch.bfloat16)),
    ],
)
def test_unknown_values_are_refused(option, value, text):
    with pytest.raises(ConfigError, match=text):
        E3VASidePath(STAGES, rank=2, **{option: value})


@pytest.mark.parametrize(
    'rank, expected', [(2, [2, 2]), ([1, 3], [1, 3]), ((3,), [3, 3])]
)
def test_each_stage_can_have_its_own_rank(rank, expected):
    side = E3VASidePath(STAGES, rank=rank)
    ranks = [stage[0]['left'].down.p.shape[1] for stage in side.stages]
    assert ranks == expected


@pytest.mark.parametrize(
    'options, text',
    [
        (dict(rank=[]), 'rank` should be a whole number, or one for each'),
        (dict(rank=[2, 9]), r'rank` should be in \[1, 8\]'),
    ],
)
def test_ranks_out_of_range_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        E3VASidePath(STAGES, **{'rank': 2, **options})
