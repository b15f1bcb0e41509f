"""Seeds of all generators of random numbers."""

import random
from collections.abc import Sequence

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
