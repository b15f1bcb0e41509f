"""Tuners of the last blocks alone."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.measure.kept import kept_for_backward
from tests.test_tuners.cases import INSIDE, TUNERS, loss_of, wake
from tests.trunk_cases import build_ours, flat, image_for, ours_and_stock

KINDS = {name: (TUNERS[name], 'last') for name in INSIDE} | {
    'partial': (TUNERS['partial'], 'blocks')
}
PAIRS = [
    (trunk, kind) for trunk in ('dinov2', 'swin of mmdet') for kind in KINDS
]


def tuner_of(kind, count):
    tuner, option = KINDS[kind]
    return dict(tuner, **{option: count})


@pytest.mark.parametrize('trunk, kind', PAIRS)
def test_the_graph_begins_at_the_last_blocks(trunk, kind):
    ours, stock = ours_and_stock(trunk, tuner=tuner_of(kind, 2))
    image = image_for(trunk)
    with torch.no_grad():
        found, expected = flat(ours.eval()(image)), flat(stock(image))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    wake(ours).train()
    graph = {}
    for path, block in ours.trunk.body():
        block.register_forward_hook(
            lambda module, args, output, path=path: graph.update(
                {path: output.requires_grad}
            )
        )
    loss_of(ours(image)).backward()
    *before, _, _ = (path for path, _ in ours.trunk.body())
    assert before and [p for p, on in graph.items() if not on] == before
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert not name.startswith(tuple(f'{p}.' for p in before))
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize('trunk, kind', PAIRS)
def test_fewer_blocks_keep_less_for_backward(trunk, kind):
    image = image_for(trunk)
    kept = [
        kept_for_backward(
            build_ours(trunk, tuner=tuner_of(kind, count)).train(), image
        )
        for count in (1, 2, 4)
    ]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize('kind', KINDS)
def test_all_blocks_are_the_most(kind):
    option = KINDS[kind][1]
    message = f'`tuner.{option}` should be a whole number from 1 to the 4 bl'
    with pytest.raises(ConfigError, match=message):
        build_ours('dinov2', tuner=tuner_of(kind, 5))
    with pytest.raises(ConfigError, match=f'`tuner.{option}` should be'):
        build_ours('dinov2', tuner=tuner_of(kind, 0))
