"""E3VA over stages of numbers: it knows no backbone."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Downsampling, StageSpec
from e3va_mm.tuners import E3VA
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.utils import count_parameters
from tests.helpers import SWIN, build_e3va

STAGES = [
    StageSpec(8, 2, ('left', 'right')),
    StageSpec(16, 1, ('left', 'right')),
]
WEIGHT = torch.randn(16, 8)


def build(**options):
    return E3VA(**{'rank': 2, **options}).build(STAGES)


def drawn(**options):
    tuner = build(**options)
    for parameter in tuner.parameters():
        torch.nn.init.normal_(parameter)
    return tuner


def gather(tokens, norm=True):
    return torch.nn.functional.layer_norm(tokens, (8,)) if norm else tokens


DOWNSAMPLING = Downsampling(gather, lambda: WEIGHT)


def test_taps_add_up_in_parallel():
    tuner, taps = drawn(), torch.randn(4, 1, 3, 8)
    highway = tuner.start(0, None)
    for i, value in enumerate(taps):
        block, tap = i // 2, STAGES[0].taps[i % 2]
        tuner.add_tap(highway, 0, block, tap, value)
    expected = tuner.stages[0](taps[:, 0]).sum(0, keepdim=True)
    torch.testing.assert_close(highway.sum(), expected)
    trunk = torch.randn(1, 3, 8)
    total = tuner.output(highway, trunk, (1, 3))
    torch.testing.assert_close(total, trunk + expected)
    assert tuner.output(tuner.start(0, None), trunk, (1, 3)) is trunk


def test_both_forms_of_inheritance_keep_zero_at_zero():
    trunk, base = torch.randn(2, 1, 3, 8)
    difference = (gather(trunk + base) - gather(trunk)) @ WEIGHT.T
    for form, expected in dict(
        difference=difference, linear=base @ WEIGHT.T
    ).items():
        tuner = drawn(downsampling=form)

        def inherit(base, tuner=tuner):
            begun = tuner.start(0, base)
            total = trunk if base is None else trunk + base
            return tuner.inherit(begun, total, trunk, DOWNSAMPLING)

        assert not inherit(torch.zeros_like(trunk)).any()
        torch.testing.assert_close(inherit(base), expected)
        assert inherit(None) is None


@pytest.mark.parametrize(
    'size, outputs, count',
    [
        ('b', (0, 1, 2, 3), 1_195_008),
        ('l', (0, 1, 2, 3), 1_792_512),
        ('t', (0, 1, 2, 3), 440_064),
        ('s', (0, 1, 2, 3), 896_256),
        ('l', (1, 2, 3), 1_792_128),  # RetinaNet's, without the first norm
    ],
)
def test_trainable_counts_are_the_published_ones(
    size, outputs, count, without_values
):
    ours = build_e3va(**SWIN[size], out_indices=outputs)
    assert count_parameters(ours)[1] == count


def test_another_tuner_beside_the_trunk_can_be_registered():
    @MODELS.register_module(force=True)
    class SilentSidePath(E3VA):
        def output(self, highway, trunk, size):
            return trunk + 0 * highway.sum()

    backbone = build_e3va(tuner=dict(type='e3va_mm.SilentSidePath'))
    assert type(backbone.tuner) is SilentSidePath
    backbone(torch.randn(1, 3, 64, 64))[0].sum().backward()
    assert not backbone.tuner.stages[0].up.q.grad.any()


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
    tuner = drawn(downsampling=form, save_taps=save_taps)
    trunk, base = torch.randn(2, 1, 30, 8)
    total = (trunk + base).requires_grad_()
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        begun = tuner.start(0, total)
        result = tuner.inherit(begun, total, trunk, DOWNSAMPLING)
    assert result.requires_grad
    assert sum(kept.values()) == 30 * of_a_token + once


@pytest.mark.parametrize('taps', [['left'], ('left', 'right'), None])
def test_taps_can_be_chosen(taps):
    tuner = build(taps=taps)
    expected = taps or ('left', 'right')
    assert tuner.taps == tuple(expected)
    assert tuner.stages[0].names == tuple(
        f'{block}.{tap}' for block in (0, 1) for tap in expected
    )


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
    tuner = build(save_taps=save_taps)
    for stage, mode in enumerate(expected):
        assert tuner.start(stage, None).codec is TAP_CODECS[mode]


@pytest.mark.parametrize('compute', [None, 'fp32', 'bf16', 'fp16'])
def test_adapters_compute_in_the_type_asked_for(compute):
    assert build(compute=compute).start(0, None).compute == DTYPES.get(compute)


@pytest.mark.parametrize(
    'rank, expected', [(2, [2, 2]), ([1, 3], [1, 3]), ((3,), [3, 3])]
)
def test_each_stage_can_have_its_own_rank(rank, expected):
    ranks = [bank.down.p.shape[2] for bank in build(rank=rank).stages]
    assert ranks == expected


WAYS = r"save_taps` should be one of \('exact', 'bf16'.* or a list of such by"
TYPES = r"compute` should be one of \(None, 'fp32', 'bf16', 'fp16'\), but got"
RANKS = 'rank` should be a whole number from 1 on, or a list of such by stage'


@pytest.mark.parametrize(
    'option, value, text',
    [
        *(
            ('save_taps', value, WAYS)
            for value in ('fp4', [], ['exact', 'fp4'], None, [['exact']])
        ),
        *(('compute', value, TYPES) for value in ('int8', 16, torch.bfloat16)),
        *(('rank', value, RANKS) for value in ([], 0, True, 1.5, [2, '2'])),
        ('rank', [2, 9], r'`tuner.rank` should be in \[1, 8\]'),
        ('bottleneck_ratio', 0, 'ratio` should be a number above 0 at most'),
        ('taps', 'left', '`tuner.taps` should be a list of names, or None'),
        ('taps', ['up'], r"taps` should name some of \('left', 'right'\)"),
        ('taps', ['left', 'left'], 'each once, but got'),
        ('downsampling', 'conv', r"one of \('difference', 'linear'\), but"),
        ('train_output_norms', 1, 'should be True or False, but got 1'),
        ('ranks', 2, '`tuner.ranks` is unknown. Options are save_taps, comp'),
    ],
)
def test_values_that_are_refused(option, value, text):
    with pytest.raises(ConfigError, match=text):
        build(**{option: value})
