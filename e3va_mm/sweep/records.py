"""What a sweep has found, in a file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from e3va_mm.errors import ConfigError
from e3va_mm.measure.results import read_figures
from e3va_mm.sweep.curves import scalars
from e3va_mm.sweep.settings import Setting
from e3va_mm.utils.files import write_whole


class Best(NamedTuple):
    """The best validation of a run, and where that was."""

    value: float
    step: int


class SweepRecords:
    """The runs of a sweep, those of earlier commands too.

    Args:
        folder (Path): Where ``sweep.json`` is, or will be; each run has a
            folder in it.
        settings (Mapping): What all runs depend on. ``metric`` names the one
            that they are ranked by, or is None.

    Attributes:
        runs (dict[str, dict]): Name of a run to its ``options`` and ``seed``,
            whether it is ``done``, and how it has ``diverged``.

    Raises:
        ConfigError: If the file holds runs of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.path = folder / 'sweep.json'
        self.runs: dict[str, dict] = {}
        if self.path.exists():
            header = dict(settings=self.settings, runs={})
            other = 'name another folder with --work-dir'
            self.runs = read_figures(self.path, header, other)['runs']

    def plan(self, settings: Iterable[Setting]) -> list[Setting]:
        """Take runs in; those that are left to train."""
        for each in settings:
            # As the file has it: no tuples.
            row = json.loads(
                json.dumps(dict(options=each.options, seed=each.seed))
            )
            known = self.runs.setdefault(each.name, dict(row, done=False))
            if {key: known[key] for key in row} != row:
                raise ConfigError(
                    f'{self.path} has another run {each.name}. Name another '
                    'folder with --work-dir.'
                )
        self.write()
        return [each for each in settings if not self.runs[each.name]['done']]

    def end(self, name: str, diverged: str | None = None) -> None:
        """Take down that a run is over."""
        self.runs[name].update(done=True, diverged=diverged)
        self.write()

    def write(self) -> None:
        """Write the file; it is whole at every moment."""
        content = dict(settings=self.settings, runs=self.runs)
        write_whole(self.path, json.dumps(content, indent=1).encode())

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a run: of the metric, or of the loss."""
        key = self.settings['metric'] or 'loss'
        return [
            (row['step'], row[key])
            for row in scalars(self.folder / name)
            if key in row and math.isfinite(row[key])
        ]

    def best(self, name: str) -> Best | None:
        """The highest metric of a run, or its last loss."""
        curve = self.curve(name)
        if not curve:
            return None
        if self.settings['metric'] is None:
            return Best(*reversed(curve[-1]))
        step, value = max(curve, key=lambda point: point[1])
        return Best(value, step)

    def ranked(self) -> list[str]:
        """Names of all runs, the best first; those without a figure last."""
        sign = 1 if self.settings['metric'] is None else -1

        def rank(name: str) -> tuple[bool, float]:
            best = self.best(name)
            diverged = bool(self.runs[name].get('diverged'))
            return best is None or diverged, best and sign * best.value or 0.0

        return sorted(self.runs, key=rank)
