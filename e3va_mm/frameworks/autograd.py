"""Whether autograd is at work."""

import torch


def in_backward() -> bool:
    """Whether this thread runs a part of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def next_node() -> int:
    """The number of the next node of a graph that this thread makes."""
    return torch.autograd._get_sequence_nr()


def running_node() -> int | None:
    """The number of the node that runs in this backward, if it has one."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
