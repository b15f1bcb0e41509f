"""Compare the tensors of a file with those that a module expects.

mmengine's own loader only logs what is missing or has another shape. For a
trunk that never trains this is not enough: nothing would ever repair it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e3va_mm.errors import CheckpointError

_SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What arrived from a file. ``str(report)`` is its line in the log.

    Attributes:
        what: What was loaded, such as ``'trunk'``.
        source: The file that it came from.
        matched: Number of tensors that arrived.
        total: Number of tensors that were expected.
        matched_values: Number of scalars in the tensors that arrived.
        leftovers: Keys of the file that were expected not to be used.
        notes: Anything else worth a line, such as the format of the file.
    """

    what: str
    source: str
    matched: int
    total: int
    matched_values: int
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f'{self.what}: {self.matched} of {self.total} tensors '
            f'({self.matched_values / 1e6:.1f} M values) from {self.source}'
        )
        if self.leftovers:
            text += f'; not used: {_first(self.leftovers)}'
        return '\n'.join([text, *self.notes])


def _first(items: Sequence[str], separator: str = ', ') -> str:
    more = len(items) - _SHOWN
    shown = separator.join(items[:_SHOWN])
    return f'{shown}{separator}... and {more} more' if more > 0 else shown


def _shape(value: torch.Size | Tensor) -> tuple[int, ...] | str:
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


def match_state(
    expected: Mapping[str, torch.Size | Tensor],
    found: Mapping[str, Tensor],
    *,
    expected_leftovers: Sequence[str | re.Pattern] = (),
    what: str,
    source: str,
    hint: str | Callable[[], str] = '',
    notes: Sequence[str] = (),
) -> LoadReport:
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
        notes: Lines to add to the report. Defaults to none.

    Returns:
        The report of a complete match.

    Raises:
        CheckpointError: If a key is missing, has another shape, is left over
            without being expected to, or holds numbers of another kind, NaN
            or infinity.
    """
    missing = [key for key in expected if key not in found]
    shapes = {
        key: (_shape(found[key]), _shape(value))
        for key, value in expected.items()
        if key in found
    }
    misshaped = [
        f'{key}: {have} in the file, {want} expected'
        for key, (have, want) in shapes.items()
        if have != want
    ]
    spoilt = [
        f'{key}: {fault}'
        for key, (have, want) in shapes.items()
        if have == want and (fault := _fault(found[key], expected[key]))
    ]
    left = [key for key in found if key not in expected]
    leftovers = [
        key
        for key in left
        if any(re.fullmatch(pattern, key) for pattern in expected_leftovers)
    ]
    unexpected = [key for key in left if key not in leftovers]
    matched = len(shapes) - len(misshaped) - len(spoilt)

    if missing or misshaped or spoilt or unexpected:
        lines = [
            f'{source} does not fit the {what}: {matched} of '
            f'{len(expected)} tensors match.'
        ]
        for name, items in (
            ('missing in the file', missing),
            ('of another shape', misshaped),
            ('with numbers that cannot be', spoilt),
            ('not expected', unexpected),
        ):
            if items:
                shown = _first(items, '\n    ')
                lines.append(f'  {len(items)} {name}:\n    {shown}')
        lines.append(hint() if callable(hint) else hint)
        raise CheckpointError('\n'.join(filter(None, lines)))

    return LoadReport(
        what=what,
        source=source,
        matched=matched,
        total=len(expected),
        matched_values=sum(found[key].numel() for key in expected),
        leftovers=tuple(leftovers),
        notes=tuple(notes),
    )
