"""Whether autograd is at work."""

import torch


def in_backward() -> bool:
    """Whether this thread runs a part of a backward pass."""
    return torch._C._current_graph_task_id() != -1
