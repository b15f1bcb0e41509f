import os

# One thread a test process: the suite runs in parallel, and sums in one
# thread are the same from run to run.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
