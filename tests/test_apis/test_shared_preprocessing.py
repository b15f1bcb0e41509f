"""Pipelines that begin alike run once."""

import numpy as np
from mmcv.transforms import Resize

from e3va_mm.apis.shared_preprocessing import run_pipelines


class Count:
    """Adds a number in place, and counts."""

    calls = 0

    def __init__(self, number):
        self.number = number

    def __call__(self, found):
        type(self).calls += 1
        found['img'] += self.number
        return found


def test_equal_beginnings_run_once():
    Count.calls = 0
    image = dict(img=np.zeros((2, 2), int))
    found = run_pipelines(
        dict(
            a=[Count(1), Count(2), Count(3)],
            b=[Count(1), Count(2), Count(3)],
            c=[Count(1), Count(5)],
            d=[],
        ),
        image,
    )
    assert Count.calls == 4
    assert {n: each['img'].max() for n, each in found.items()} == dict(
        a=6, b=6, c=6, d=0
    )
    assert not image['img'].any()
    found['a']['img'][:] = 9
    assert found['b']['img'].max() == 6


def test_transforms_of_the_frameworks_are_told_apart():
    image = dict(img=np.zeros((8, 8, 3), np.uint8))
    found = run_pipelines(
        dict(
            a=[Resize(scale=(4, 4))],
            b=[Resize(scale=(4, 4))],
            c=[Resize(scale=(6, 6))],
        ),
        image,
    )
    assert [found[name]['img_shape'] for name in 'abc'] == [
        (4, 4),
        (4, 4),
        (6, 6),
    ]
