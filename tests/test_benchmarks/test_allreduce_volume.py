"""Exactly what trains is exchanged, and nothing of a frozen trunk."""

from pathlib import Path

import pytest
from mmengine.config import Config

from tests.test_engine.test_hooks.tiny import (
    detection_config,
    side_path_config,
)

FOLDER = Path(__file__).parents[2] / 'benchmarks'
VARIANTS = ('full', 'frozen', 'exact', 'lean')


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp('volume')
    config, _, _ = side_path_config(
        folder,
        detection_config(folder),
        'neck=dict(in_channels=[32, 64, 128, 256])',
    )
    with pytest.MonkeyPatch.context() as patch:
        # By its name, so that its processes find it.
        patch.syspath_prepend(FOLDER)
        from allreduce_volume import measure

        found = measure(Config.fromfile(config), VARIANTS, 64)
    return {row['variant']: row for row in found}


def test_what_trains_is_reduced_and_nothing_else(rows):
    assert tuple(rows) == VARIANTS
    for row in rows.values():
        assert row['reduced'] == row['trainable'], row


def test_the_backbone_s_share(rows):
    # Side path and output norms of the tiny trunk, in single precision.
    assert rows['exact']['backbone'] == 4 * (63_360 + 960)
    assert rows['lean']['backbone'] == rows['exact']['backbone']
    assert rows['frozen']['backbone'] == 0
    full, exact = rows['full'], rows['exact']
    assert full['reduced'] == full['parameters']
    heads = full['reduced'] - full['backbone']
    assert exact['reduced'] == heads + exact['backbone']
