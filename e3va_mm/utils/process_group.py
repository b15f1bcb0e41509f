"""The end of a group of processes."""

import gc

import torch.distributed as dist


def end_process_group() -> None:
    """Leave the group and end its threads.

    What refers to itself, as a runner and DDP do, keeps the group beyond its
    destruction, and threads that are left to the end of the process can abort
    it. What the caller itself still holds is not freed.
    """
    gc.collect()
    dist.destroy_process_group()
