"""What a comparison has found, and what is left of it to do."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from e3va_mm.measure.results import read_figures
from e3va_mm.utils.files import write_whole

# A metric that is not named: the first that a validation gives.
AUTO = 'auto'


class Run(NamedTuple):
    """One training."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Also the run's folder."""
        return f'{self.method}/lr{self.lr:g}-seed{self.seed}'


class Records:
    """The runs of a comparison and their figures, in a file.

    Every method trains with each learning rate and the first seed; the rate
    that is best on validation trains with the other seeds. The test split is
    for the runs of that rate.

    Args:
        folder (Path): Where ``comparison.json`` is, or will be.
        settings (Mapping): What figures depend on. ``metric`` names the one
            that chooses, or is ``'auto'``: the first that a validation gives.
        methods (Sequence[str]): What to compare.
        lrs (Sequence[float]): The learning rates.
        seeds (Mapping[str, int]): How many seeds a method has.

    Attributes:
        runs (dict[str, dict]): Name of a run to its figures: ``validation``
            and ``test`` by metric, or ``diverged``.
        measured (dict[str, dict]): Method to the figures of its step.
        cpu_seconds (float): What all of it has computed.

    Raises:
        ConfigError: If the file holds figures of other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping,
        methods: Sequence[str],
        lrs: Sequence[float],
        seeds: Mapping[str, int],
    ) -> None:
        self.path = folder / 'comparison.json'
        self.settings = dict(settings)
        self.methods, self.seeds = list(dict.fromkeys(methods)), seeds
        self.lrs = sorted(set(lrs))
        found: dict = {}
        if self.path.exists():
            header = dict(settings=self.settings, runs={}, measured={})
            found = read_figures(
                self.path, header, 'name another folder with --work-dir'
            )
        self.runs = found.get('runs', {})
        self.measured = found.get('measured', {})
        self.cpu_seconds = found.get('cpu_seconds', 0.0)

    @property
    def metric(self) -> str:
        """The metric that chooses; ``'auto'`` before any validation."""
        if self.settings['metric'] != AUTO:
            return self.settings['metric']
        found = (row.get('validation', {}) for row in self.runs.values())
        return next((name for figures in found for name in figures), AUTO)

    def write(self) -> None:
        """Write the file; it is whole at every moment."""
        content = dict(
            settings=self.settings,
            cpu_seconds=round(self.cpu_seconds, 1),
            runs=self.runs,
            measured=self.measured,
        )
        write_whole(self.path, json.dumps(content, indent=1).encode())

    def update(self, run: Run, **figures) -> None:
        """Add figures of a run."""
        row = self.runs.setdefault(run.name, run._asdict())
        row.update(figures)
        self.write()

    def validation(self, run: Run) -> float | None:
        """The metric of a run on validation, if it is trained; or NaN."""
        row = self.runs.get(run.name, {})
        if row.get('diverged'):
            return math.nan
        return row.get('validation', {}).get(self.metric)

    def diverged(self, run: Run) -> bool:
        """Whether a run was trained to no figure."""
        return self.runs.get(run.name, {}).get('diverged', False)

    def searches(self, method: str) -> list[Run]:
        """The runs that choose the learning rate."""
        return [Run(method, lr, 0) for lr in self.lrs]

    def chosen(self, method: str) -> list[Run]:
        """The runs of the best rate, the lowest of equals.

        None while it is not known, or if all have diverged.
        """
        values = {run: self.validation(run) for run in self.searches(method)}
        if None in values.values():
            return []
        runs = [run for run in values if not self.diverged(run)]
        if not runs:
            return []
        best = max(runs, key=values.get)
        return [best._replace(seed=seed) for seed in range(self.seeds[method])]

    def to_train(self) -> list[Run]:
        """Runs that can be trained now; more may follow from their figures."""
        return [
            run
            for method in self.methods
            for run in dict.fromkeys(
                [*self.searches(method), *self.chosen(method)]
            )
            if self.validation(run) is None
        ]

    def left(self) -> int:
        """How many trainings are left, including those to come."""
        unknown = sum(
            self.seeds[method] - 1
            for method in self.methods
            if None in map(self.validation, self.searches(method))
        )
        return len(self.to_train()) + unknown

    def to_test(self) -> list[Run]:
        """Chosen runs without test figures."""
        return [
            run
            for method in self.methods
            for run in self.chosen(method)
            if not self.diverged(run)
            and 'test' not in self.runs.get(run.name, {})
        ]

    def values(self, method: str, split: str, metric: str) -> list[float]:
        """A metric of the chosen runs of a method that have it.

        NaN stands for one that has diverged.
        """
        found = []
        for run in self.chosen(method):
            figures = self.runs.get(run.name, {}).get(split, {})
            if self.diverged(run):
                found.append(math.nan)
            elif metric in figures:
                found.append(figures[metric])
        return found
