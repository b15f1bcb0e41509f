"""Compare the tensors of a file with those that a module expects.

mmengine's own loader only logs what is missing or has another shape. For a
trunk that never trains this is not enough: nothing would ever repair it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from e3va_mm.errors import CheckpointError
from e3va_mm.utils.listing import listed

# Names of a kind in one message.
SHOWN = 5


def match_state(
    expected: Mapping[str, torch.Size | Tensor],
    found: Mapping[str, Tensor],
    *,
    expected_leftovers: Sequence[str | re.Pattern] = (),
    what: str,
    source: str,
    hint: str | Callable[[], str] = '',
    notes: Sequence[str] = (),
) -> str:
    """Check that `found` holds exactly what `expected` asks for.

    Args:
        expected: Every tensor that must arrive, or its shape, by key.
        found: The tensors of the file by key.
        expected_leftovers: Regular expressions for keys of the file that may
            be left over; each must match the whole key.
        what: What is loaded, for messages, such as ``'trunk'``.
        source: Where `found` comes from, for messages.
        hint: The likely cause of a mismatch, or a function that finds it; it
            is called only where there is a mismatch. Defaults to none.
        notes: Lines to add to what is returned. Defaults to none.

    Returns:
        What arrived, for the log.

    Raises:
        CheckpointError: If a key is missing, has another shape, is left over
            without being expected to, or holds numbers of another kind, NaN
            or infinity.
    """
    wanted = {key: _shape(value) for key, value in expected.items()}
    have = {key: _shape(found[key]) for key in wanted if key in found}
    fitting = [key for key in have if have[key] == wanted[key]]
    left = [key for key in found if key not in wanted]
    leftovers = [
        key
        for key in left
        if any(re.fullmatch(pattern, key) for pattern in expected_leftovers)
    ]
    spoilt = {key: _fault(found[key], expected[key]) for key in fitting}
    spoilt = {key: fault for key, fault in spoilt.items() if fault}
    faults = {
        'missing in the file': [key for key in wanted if key not in have],
        'of another shape': [
            f'{key}: {have[key]} in the file, {wanted[key]} expected'
            for key in have
            if have[key] != wanted[key]
        ],
        'with numbers that cannot be': [
            f'{key}: {fault}' for key, fault in spoilt.items()
        ],
        'not expected': [key for key in left if key not in leftovers],
    }
    if any(faults.values()):
        matched = len(fitting) - len(spoilt)
        lines = [
            f'{source} does not fit the {what}: {matched} of {len(expected)} '
            'tensors match.'
        ]
        for name, items in faults.items():
            if items:
                lines.append(f'  {len(items)} {name}:')
                lines += [f'    {item}' for item in items[:SHOWN]]
                if len(items) > SHOWN:
                    lines.append(f'    ... and {len(items) - SHOWN} more')
        lines.append(hint() if callable(hint) else hint)
        raise CheckpointError('\n'.join(filter(None, lines)))
    values = sum(found[key].numel() for key in fitting) / 1e6
    text = (
        f'{what}: all {len(fitting)} tensors ({values:.1f} M values) from '
        f'{source}'
    )
    if leftovers:
        text += f'; not used: {listed(leftovers, SHOWN)}'
    return '\n'.join([text, *notes])


def _shape(value: Any) -> tuple[int, ...] | str:
    """Of a tensor, or a shape itself; the type of anything else."""
    if isinstance(value, Tensor):
        value = value.shape
    return tuple(value) if isinstance(value, tuple) else type(value).__name__


def _fault(value: Tensor, expected: torch.Size | Tensor) -> str | None:
    """What is wrong with the numbers of a tensor, None for nothing."""
    if isinstance(expected, Tensor) and (
        value.is_floating_point() != expected.is_floating_point()
        or value.is_complex() != expected.is_complex()
    ):
        have, want = (
            str(each.dtype).removeprefix('torch.')
            for each in (value, expected)
        )
        return f'{have} in the file, {want} expected'
    if not value.is_floating_point():
        return None
    try:
        numbers = value.detach().float()
    except RuntimeError:  # packed types, such as two numbers in a byte
        return f'{value.dtype} cannot be computed with'
    # The sum takes no memory, but can overflow where no number does.
    if torch.isfinite(numbers.sum()) or torch.isfinite(numbers).all():
        return None
    return 'NaN or infinity'
