"""What is wrong with the entries of a COCO annotation file."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from e3va_mm.utils import is_number

# What an entry must hold, by the name of its list: key -> is it good?
_IS_TEXT = (lambda value: isinstance(value, str) and value, 'a text')
_IS_SIZE = (
    lambda value: is_number(value) and value > 0,
    'a number above zero',
)
_IS_BOX = (
    lambda value: (
        isinstance(value, list)
        and len(value) == 4
        and all(map(is_number, value))
    ),
    'four numbers: x, y, width, height',
)
_IS_NUMBER = (is_number, 'a number')
ENTRIES: Mapping[str, Mapping[str, tuple]] = {
    'images': dict(file_name=_IS_TEXT, height=_IS_SIZE, width=_IS_SIZE),
    'annotations': dict(bbox=_IS_BOX, area=_IS_NUMBER),
    'categories': dict(name=_IS_TEXT),
}


def coco_fault(content: Any) -> str | None:
    """Find the first entry that no reader of COCO files can take.

    Args:
        content (Any): What the JSON file holds.

    Returns:
        str, optional: What it is, to go on a sentence about the file; None
        if there is none.
    """
    if not isinstance(content, Mapping):
        return (
            f'holds a {type(content).__name__}, not a dict of '
            f'{", ".join(ENTRIES)}'
        )
    for name, expected in ENTRIES.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            return f'has no list `{name}`'
        for place, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                return f'has {entry!r} at {name}[{place}], which is no dict'
            at = f'{name}[{place}] (id {entry.get("id")})'
            for key, (is_good, what) in expected.items():
                if key in entry and not is_good(entry[key]):
                    return f'has {key}={entry[key]!r} at {at}; expected {what}'
        ids = Counter(str(entry.get('id')) for entry in entries)
        repeated = [each for each, count in ids.items() if count > 1]
        if repeated:
            return f'has several {name} with the id {repeated[0]}'
    return None
