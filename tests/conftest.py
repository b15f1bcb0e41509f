import functools
import logging
import os
import sys

# One thread a test process: the suite runs in parallel, and sums in one
# thread are the same from run to run.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MMLogger

from e3va_mm.registry import install
from e3va_mm.utils import end_process_group

# A logger of the frameworks may hold a stream that a test had captured; each
# line would print the whole stack.
logging.raiseExceptions = False

# Tests import the frameworks in any order, and read checkpoints before models.
install()


@pytest.fixture(autouse=True)
def freed_memory_goes(monkeypatch):
    """Commands run in this process, whose memory many tests share."""
    for name in ('train', 'test', 'measure'):
        command = sys.modules.get(f'e3va_mm.commands.{name}')
        if command is not None:
            monkeypatch.setattr(command, 'keep_freed_memory', bool)


@pytest.fixture(autouse=True)
def no_logger_is_left():
    """Two runs of one name and second share a logger, and with it a stream."""
    MMLogger._instance_dict.clear()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    end_process_group()


@pytest.fixture
def without_values(monkeypatch):
    """Modules are built without memory for their values."""
    # Stochastic depth reads the numbers of this one.
    linspace = functools.partial(torch.linspace, device='cpu')
    monkeypatch.setattr(torch, 'linspace', linspace)
    with torch.device('meta'):
        yield
