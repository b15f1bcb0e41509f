"""The rows of a measurement: their file, and which belong together.

A *row* is what is known of one measured step: ``config`` (path) and
``variant``, and of ``parameters``, ``memory_bytes`` (those of
:class:`~e3va_mm.measure.TrainingStep`) and ``seconds`` (of each timed step)
what was measured. *Rows* are a mapping of labels to them, in order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from e3va_mm.errors import ConfigError
from e3va_mm.measure.fits import GIB

Rows = Mapping[str, Mapping]


class Results:
    """The rows, and their file, written anew after every change.

    Args:
        rows (dict[str, dict]): Those planned; what the file holds of them is
            filled in.
        header (dict): ``environment`` and ``arguments`` of this measurement.
        path (Path, optional): The file. Defaults to none.
        resume (bool): Whether to go on with what the file holds. Defaults to
            False.

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
        self.header, self.path = header, path
        # Also what was measured before and is not asked for now.
        self.all = {}
        if resume and path.exists():
            self.all = self._read()
        for label, row in rows.items():
            old = self.all.get(label, {})
            # A config that has changed since is measured again.
            if all(old.get(key) == value for key, value in row.items()):
                rows[label] = old
        self.rows = rows
        self.all |= rows

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self.path.read_text())
            rows = found['variants']
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'{self.path} does not hold figures of this tool. Remove it, '
                'or name another file with --json.'
            ) from None
        for part, values in self.header.items():
            before = found.get(part, {})
            changed = [
                f'{key} was {before.get(key)}, is {value}'
                for key, value in values.items()
                if before.get(key) != value
            ]
            if changed:
                raise ConfigError(
                    f'{self.path} holds figures of another measurement: '
                    f'{"; ".join(changed)}. Repeat its arguments on its '
                    'machine, or name another file with --json.'
                )
        return rows

    def update(self, label: str, **figures) -> None:
        """Fill in a row; the file is whole at every moment."""
        self.rows[label].update(figures)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f'{self.path.name}.new')
        new.write_text(
            json.dumps(dict(self.header, variants=self.all), indent=2)
        )
        new.replace(self.path)


def references(rows: Rows) -> dict[str, str]:
    """What each row is compared with.

    That is the row ``full`` of the same config; where there is none, the
    first of the config's rows; where that is its only row, the first of all.

    Args:
        rows (Rows): The rows.

    Returns:
        dict[str, str]: Label to label.
    """
    found = {}
    for label, row in rows.items():
        same = [k for k, r in rows.items() if r['config'] == row['config']]
        full = [k for k in same if rows[k]['variant'] == 'full']
        first = same if len(same) > 1 else list(rows)
        found[label] = (full or first)[0]
    return found


def groups(rows: Rows) -> Iterator[Rows]:
    """Split rows into those that are compared with the same one.

    Args:
        rows (Rows): The rows.

    Yields:
        Rows: A part of them; see :func:`references`.
    """
    base = references(rows)
    for reference in dict.fromkeys(base.values()):
        yield {k: row for k, row in rows.items() if base[k] == reference}


def check_room(rows: Rows, free: int | None) -> None:
    """See that all steps of one timing have room beside each other.

    Each holds its weights and optimizer state all the time, and one at a
    time the rest of its peak.

    Args:
        rows (Rows): The rows. Unless the memory of all is known, nothing is
            checked.
        free (int, optional): Bytes that are free; None where not known.

    Raises:
        ConfigError: If they have not; it proposes what to compare at a time.
    """
    memory = {
        k: r['memory_bytes'] for k, r in rows.items() if 'memory_bytes' in r
    }
    if free is None or len(memory) < len(rows):
        return

    def needed(labels: Sequence[str]) -> int:
        held = [memory[k]['weights'] + memory[k]['optimizer'] for k in labels]
        rest = (
            memory[k]['peak'] - h for k, h in zip(labels, held, strict=True)
        )
        return sum(held) + max(rest)

    labels = list(rows)
    if needed(labels) <= free:
        return
    fitting = labels[:1]
    for label in labels[1:]:
        if needed([*fitting, label]) <= free:
            fitting.append(label)
    proposal = 'Leave'
    if len(fitting) > 1:
        proposal = f'Compare fewer, such as {", ".join(fitting)}; or leave'
    raise ConfigError(
        f'Timing {", ".join(labels)} in turns needs about '
        f'{needed(labels) / GIB:.1f} GiB, weights and optimizer state of all '
        f'at once, but {free / GIB:.1f} GiB are free. {proposal} '
        'time out with --memory-only.'
    )
