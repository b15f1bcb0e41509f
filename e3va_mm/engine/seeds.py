"""The generators of random numbers of torch, numpy and Python, all at once."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def seed_all(numbers: Sequence[int]) -> None:
    """Seed the generators of torch, numpy and Python.

    Args:
        numbers (Sequence[int]): What the seeds follow from, none negative.
            Neighbours give unrelated seeds; zeros at the end are ignored.
    """
    seeds = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    torch.manual_seed(int(seeds[0]))
    np.random.seed(seeds[1])
    random.seed(int(seeds[2]))


def generator_states(cuda: bool = False) -> tuple[Any, ...]:
    """Where the generators are.

    Args:
        cuda (bool): Whether that of the current GPU is among them; not for
            data workers, which may not touch it. Defaults to False.
    """
    return (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
    )


def set_generators(states: tuple[Any, ...]) -> None:
    """Let the generators go on from :func:`generator_states`."""
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)
