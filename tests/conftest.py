import logging
import os

# One thread a test process: the suite runs in parallel, and sums in one
# thread are the same from run to run.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from e3va_mm.errors import E3VAError
from e3va_mm.measure.live_bytes import OLDEST_TORCH
from e3va_mm.registry import install
from e3va_mm.utils import end_process_group

# A logger of the frameworks may hold a stream that a test had captured; each
# line would print the whole stack.
logging.raiseExceptions = False

# Tests import the frameworks in any order, and read checkpoints before models.
install()

if TorchVersion(torch.__version__) < OLDEST_TORCH:

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(item):
        """Skip what the torch of the dormant originals cannot do."""
        outcome = yield
        error = outcome.excinfo and outcome.excinfo[1]
        if isinstance(error, E3VAError) and 'needs torch ' in str(error):
            outcome.force_exception(pytest.skip.Exception(str(error)))


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
