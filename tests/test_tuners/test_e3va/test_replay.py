"""When a trunk runs again, and for whom."""

import gc
import weakref

import pytest
import torch

from e3va_mm.tuners.e3va.replay import Replay

IMAGE = torch.ones(2)


class Trunk:
    """Tap ``k`` of stage ``s`` is the image times ``10 * s + k``."""

    def __init__(self):
        self.runs = []

    def __call__(self, image, last, wanted, on_tap):
        self.runs.append((last, sorted(wanted)))
        for stage in range(last + 1):
            for tap in range(2 if stage in wanted else 0):
                on_tap(stage, image * (10 * stage + tap))


def replay_of(trunk, wanted):
    replay = Replay(IMAGE, trunk)
    for stage in wanted:
        replay.want(stage)
    return replay


def values(taps):
    return [int(tap[0]) for tap in taps]


def test_one_run_serves_all_stages_from_the_last():
    trunk = Trunk()
    replay = replay_of(trunk, [0, 2, 3])
    for stage in (3, 2, 0):
        expected = [10 * stage, 10 * stage + 1]
        assert values(replay.take(stage, IMAGE)) == expected
    assert trunk.runs == [(3, [0, 2, 3])]


def test_it_runs_no_further_than_it_must():
    trunk = Trunk()
    replay = replay_of(trunk, [0, 1, 3])
    assert values(replay.take(1, IMAGE)) == [10, 11]
    assert values(replay.take(0, IMAGE)) == [0, 1]
    assert trunk.runs == [(1, [0, 1])]


@pytest.mark.parametrize('left', [[3], [3, 1], []])
def test_a_second_backward_runs_it_again_where_taps_are_gone(left):
    trunk = Trunk()
    replay = replay_of(trunk, [0, 1, 3])
    for stage in left:
        replay.take(stage, IMAGE)
    for _ in range(2):
        for stage in (3, 1, 0):
            expected = [10 * stage, 10 * stage + 1]
            assert values(replay.take(stage, IMAGE)) == expected


def test_taps_that_were_taken_are_not_held():
    replay = replay_of(Trunk(), [0, 1])
    taps = [weakref.ref(tap) for tap in replay.take(1, IMAGE)]
    gc.collect()
    assert [reference() for reference in taps] == [None, None]
