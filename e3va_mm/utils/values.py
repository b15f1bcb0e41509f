"""What an option's value is, where Python takes more than is meant.

A bool is an int, and NaN fails every comparison in silence.
"""

import math
from typing import Any


def is_whole(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """Whether a value is a whole number in ``[least, most]``, and no bool."""
    return (
        is_number(value)
        and isinstance(value, int)
        and (least <= value <= most)
    )


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no bool."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
