"""Names in messages."""

from collections.abc import Sequence


def listed(names: Sequence[str], shown: int) -> str:
    """The first names and how many more there are; ``'none'`` for none.

    Examples:
        >>> listed(['a', 'b', 'c'], 2)
        'a, b and 1 more'
    """
    more = len(names) - shown
    text = ', '.join(names[:shown]) or 'none'
    return f'{text} and {more} more' if more > 0 else text
