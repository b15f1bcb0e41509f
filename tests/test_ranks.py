"""Ranks end, whatever they do."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import WORLD, run_ranks


def add(rank, path):
    value = torch.tensor(rank + 1)
    dist.all_reduce(value)
    (path / str(rank)).write_text(str(int(value)))


def raise_in_one(rank):
    if rank:
        raise ValueError('rank 1 has failed')
    dist.barrier()


def wait_in_one(rank):
    if rank:
        time.sleep(600)


def test_ranks_talk_to_each_other(tmp_path):
    run_ranks(add, tmp_path, tmp_path)
    assert [(tmp_path / str(r)).read_text() for r in range(WORLD)] == ['3'] * 2


def test_the_error_of_a_rank_is_raised(tmp_path):
    with pytest.raises(Exception, match='ValueError: rank 1 has failed'):
        run_ranks(raise_in_one, tmp_path)


def test_a_rank_that_waits_fails(tmp_path):
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match='not ended in 20 s'):
        run_ranks(wait_in_one, tmp_path, limit=20)
    assert time.monotonic() - begin < 60
