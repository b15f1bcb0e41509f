"""Test pipelines of several tasks on the same pictures."""

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np


def run_pipelines(
    pipelines: Mapping[str, Sequence[Callable]], picture: str | np.ndarray
) -> dict[str, Any]:
    """Run pipelines on a picture; what they begin with alike runs once.

    Args:
        pipelines (Mapping[str, Sequence[Callable]]): Transforms, by name.
        picture (str | np.ndarray): What the first of them takes.

    Returns:
        dict[str, Any]: What the last of each gives; nothing is shared.
    """
    done = {
        name: copy.deepcopy(picture)
        for name, steps in pipelines.items()
        if not steps
    }
    alike = defaultdict(dict)
    for name, steps in pipelines.items():
        if steps:
            alike[_key(steps[0])][name] = steps
    for group in alike.values():
        first = next(iter(group.values()))[0]
        # Transforms change what they are given.
        found = first(copy.deepcopy(picture))
        rest = {name: steps[1:] for name, steps in group.items()}
        done |= run_pipelines(rest, found)
    return {name: done[name] for name in pipelines}


def _key(step: Callable) -> Hashable:
    """Equal for transforms that do the same.

    One with a part that cannot be told apart from another's is only equal to
    itself.
    """
    values = sorted(vars(step).items(), key=str)
    if any(isinstance(value, np.ndarray) for _, value in values):
        return id(step)  # long ones are written in short
    return type(step), repr(values)
