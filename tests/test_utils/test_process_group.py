import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.utils import end_process_group
from tests.helpers import threads_of_groups


def test_a_wrapper_that_refers_to_itself_keeps_no_thread():
    before = threads_of_groups()
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    wrapper.itself = [wrapper]
    del wrapper
    assert threads_of_groups() > before
    end_process_group()
    assert not dist.is_initialized()
    assert threads_of_groups() == before
