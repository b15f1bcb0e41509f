"""A function in several processes, as the ranks of a group; none waits long.

A rank that waits for another would keep a whole suite from ending: gloo's own
limit is half an hour, and that of joining a process is none.
"""

import faulthandler
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import e3va_mm.checkpoint  # noqa: F401 as conftest, in each rank
from e3va_mm.utils import end_process_group

WORLD = 2
LIMIT = 300  # seconds


def run_ranks(
    function: Callable, folder: Path, *args, limit: float = LIMIT
) -> None:
    """Run ``function(rank, *args)`` in ``WORLD`` processes.

    Args:
        function (Callable): Of a module, so that processes can import it.
        folder (Path): Where the ranks meet; one for each call.
        limit (float): Seconds that they may take, their imports included.
    """
    context = mp.spawn(
        _rank, (f'{folder}/ranks', limit, function, args), WORLD, join=False
    )
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                pytest.fail(f'The ranks have not ended in {limit} s.')
    finally:
        for process in context.processes:
            process.kill()


def _rank(rank, store, limit, function, args) -> None:
    # Where it waits is said before it is killed.
    faulthandler.dump_traceback_later(0.9 * limit)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    # A file, no port: that may be taken before it is listened on.
    dist.init_process_group(
        'gloo',
        f'file://{store}',
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=limit),
    )
    function(rank, *args)
    dist.barrier()
    end_process_group()
