"""The side path over a trunk of numbers: it knows no backbone."""

import pytest
import torch

from e3va_mm.models import E3VASidePath
from e3va_mm.models.trunks import Downsampling, StageSpec
from e3va_mm.registry import MODELS

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
    highway = side.start(None)
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
    torch.testing.assert_close(side.output(highway, trunk), trunk + expected)
    assert side.output(side.start(None), trunk) is trunk


def gather(tokens, norm=True):
    return torch.nn.functional.layer_norm(tokens, (8,)) if norm else tokens


def project(gathered):
    """(B, L, 8) -> (B, L, 16)."""
    return torch.cat([gathered, 2 * gathered], -1)


def test_both_forms_of_inheritance_keep_zero_at_zero():
    trunk, base = torch.randn(2, 1, 3, 8)
    downsampling = Downsampling(gather, project)
    for form, expected in [
        ('difference', project(gather(trunk + base)) - project(gather(trunk))),
        ('linear', project(base)),
    ]:
        side = drawn(downsampling=form)
        zero = side.start(torch.zeros_like(trunk))
        assert not side.inherit(zero, trunk, downsampling).any()
        torch.testing.assert_close(
            side.inherit(side.start(base), trunk, downsampling), expected
        )
        assert side.inherit(side.start(None), trunk, downsampling) is None


def test_only_the_taps_asked_for_have_adapters():
    side = E3VASidePath(STAGES, rank=2, taps=('right',))
    assert [list(block) for block in side.stages[0]] == [['right']] * 2


def test_another_kind_of_side_path_can_be_registered():
    from tests.helpers import build_e3va

    @MODELS.register_module(force=True)
    class SilentSidePath(E3VASidePath):
        def output(self, highway, trunk):
            return trunk + 0 * highway.sum()

    backbone = build_e3va(side_path=dict(type='e3va_mm.SilentSidePath'))
    assert type(backbone.side_path) is SilentSidePath
    backbone(torch.randn(1, 3, 64, 64))[0].sum().backward()
    assert not backbone.side_path.stages[0][0]['attn'].up.q.grad.any()


@pytest.mark.parametrize('taps', [['left'], ('left', 'right')])
def test_taps_are_named_by_lists_too(taps):
    assert E3VASidePath(STAGES, rank=2, taps=taps).taps == tuple(taps)
