"""The rows of a measurement: their file, and which belong together.

A *row* is what is known of one measured step: ``config`` (path) and
``variant``, and what was measured of ``parameters``, ``memory_bytes`` (those
of :class:`~e3va_mm.measure.TrainingStep`) and ``seconds`` (of each timed
step). *Rows* map labels to them, in order.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from e3va_mm.errors import ConfigError
from e3va_mm.utils.files import write_whole

Rows = Mapping[str, Mapping]


def read_figures(path: Path, header: Mapping[str, Mapping], other: str):
    """Read a file of figures that further ones are added to.

    Args:
        path (Path): A JSON file.
        header (Mapping[str, Mapping]): What figures depend on: keys of the
            file to settings.
        other (str): How to take another file, for the messages.

    Returns:
        dict: What the file holds.

    Raises:
        ConfigError: If it is no such file, or of other settings.
    """
    changed = []
    try:
        found = json.loads(path.read_text())
        for part, settings in header.items():
            before = found[part]
            changed += [
                f'{key} was {before.get(key)}, is {value}'
                for key, value in settings.items()
                if before.get(key) != value
            ]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f'{path} does not hold figures of this tool. Remove it, or '
            f'{other}.'
        ) from None
    if changed:
        raise ConfigError(
            f'{path} holds figures of another run: {"; ".join(changed)}. Use '
            f'its settings on its machine, or {other}.'
        )
    return found


class Results:
    """The rows and their file, rewritten after every change.

    Args:
        rows (dict[str, dict]): Those planned; figures that the file holds are
            filled in.
        header (dict): ``environment`` and ``arguments`` of this measurement.
        path (Path, optional): The file. Defaults to none.
        resume (bool): Whether to continue with what the file holds. Defaults
            to False.

    Raises:
        ConfigError: If the file holds figures of other arguments, or of
            another environment.
    """

    def __init__(
        self,
        rows: dict[str, dict],
        header: dict,
        path: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.header, self.path, self.rows = header, path, rows
        # Also what was measured before and is not asked for now.
        self.all: dict[str, dict] = {}
        if resume and path.exists():
            found = read_figures(
                path, {**header, 'variants': {}}, 'name another with --json'
            )
            self.all = found['variants']
        for label, row in rows.items():
            old = self.all.get(label, {})
            # A config that has changed since is measured again.
            if all(old.get(key) == value for key, value in row.items()):
                rows[label] = old
        self.all |= rows

    def update(self, label: str, **figures) -> None:
        """Fill in a row; the file is whole at every moment."""
        self.rows[label].update(figures)
        if self.path is not None:
            text = json.dumps(dict(self.header, variants=self.all), indent=2)
            write_whole(self.path, text.encode())


def groups(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Split rows into those that are compared with each other.

    These are the rows of one config; configs with a single row together.

    Args:
        rows (Rows): The rows.

    Yields:
        tuple[str, Rows]: The label of the reference, the row ``full`` or else
        the first, and the rows.
    """
    configs = [row['config'] for row in rows.values()]
    keys = {c: c if configs.count(c) > 1 else None for c in configs}
    for key in dict.fromkeys(keys.values()):
        group = {k: r for k, r in rows.items() if keys[r['config']] == key}
        full = [k for k, row in group.items() if row['variant'] == 'full']
        yield (full or list(group))[0], group
