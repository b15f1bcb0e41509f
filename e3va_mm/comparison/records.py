"""What a comparison has found, and what is left of it to do."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from e3va_mm.errors import ConfigError
from e3va_mm.utils.files import write_whole

FILE = 'comparison.json'


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
    for the runs of that rate, when all are trained.

    Args:
        folder (Path): Where ``comparison.json`` is, or will be.
        settings (Mapping): What figures depend on. ``metric`` names the one
            that chooses.
        methods (Sequence[str]): What to compare.
        lrs (Sequence[float]): The learning rates.
        seeds (Mapping[str, int]): How many seeds a method has.

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
        self.path = folder / FILE
        self.settings = dict(settings)
        self.methods, self.seeds = list(methods), seeds
        self.lrs = sorted(set(lrs))
        self.cpu_seconds = 0.0
        self.runs: dict[str, dict] = {}
        self.measured: dict[str, dict] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text())
            before = found['settings']
            self.runs, self.measured = found['runs'], found['measured']
            self.cpu_seconds = found['cpu_seconds']
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'{self.path} does not hold figures of a comparison. Remove '
                'it, or name another folder with --work-dir.'
            ) from None
        changed = [
            f'{key} was {before.get(key)}, is {value}'
            for key, value in self.settings.items()
            if before.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f'{self.path} holds figures of another comparison: '
                f'{"; ".join(changed)}. Name another folder with --work-dir.'
            )

    def _write(self) -> None:
        content = dict(
            settings=self.settings,
            cpu_seconds=round(self.cpu_seconds, 1),
            runs=self.runs,
            measured=self.measured,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(content, indent=1).encode())

    def update(self, run: Run, **figures) -> None:
        """Take in figures of a run; the file is whole at every moment."""
        row = dict(run._asdict(), lost=False, **figures)
        self.runs[run.name] = {**self.runs.get(run.name, {}), **row}
        self._write()

    def lose(self, run: Run) -> None:
        """Have a run trained anew; its rate stays chosen."""
        self.runs[run.name]['lost'] = True
        self._write()

    def spend(self, cpu_seconds: float) -> None:
        """Take in what has been computed up to now."""
        self.cpu_seconds = cpu_seconds
        self._write()

    def update_measured(self, method: str, figures: Mapping) -> None:
        """Take in the costs of a method."""
        self.measured[method] = dict(figures)
        self._write()

    def validation(self, run: Run) -> float | None:
        """The metric of a run on validation, if it is trained; or NaN."""
        row = self.runs.get(run.name, {})
        if row.get('diverged'):
            return math.nan
        found = row.get('validation')
        return found and found[self.settings['metric']]

    def diverged(self, run: Run) -> bool:
        """Whether a run was trained to no figure."""
        value = self.validation(run)
        return value is not None and math.isnan(value)

    def searches(self, method: str) -> list[Run]:
        """The runs that choose the learning rate."""
        return [Run(method, lr, 0) for lr in self.lrs]

    def is_searched(self, method: str) -> bool:
        """Whether all rates of a method are tried."""
        runs = self.searches(method)
        return all(self.validation(run) is not None for run in runs)

    def chosen(self, method: str) -> list[Run]:
        """The runs of the best rate, the lowest of equals.

        None while it is not known, or if all have diverged.
        """
        runs = [r for r in self.searches(method) if not self.diverged(r)]
        if not runs or not self.is_searched(method):
            return []
        best = max(runs, key=self.validation)
        return [best._replace(seed=seed) for seed in range(self.seeds[method])]

    def _waits(self, run: Run) -> bool:
        """Whether a run is to be trained."""
        lost = self.runs.get(run.name, {}).get('lost', False)
        return lost or self.validation(run) is None

    def runs_of(self, method: str) -> list[Run]:
        """The runs of a method that are known to be needed, each once."""
        return list(
            dict.fromkeys([*self.searches(method), *self.chosen(method)])
        )

    def to_train(self) -> Iterator[Run]:
        """Runs that can be trained now; more may follow from their figures."""
        for method in self.methods:
            for run in self.runs_of(method):
                if self._waits(run):
                    yield run

    def left(self) -> int:
        """How many trainings are left, those to come included."""
        left = 0
        for method in self.methods:
            left += sum(map(self._waits, self.runs_of(method)))
            if not self.is_searched(method):
                left += self.seeds[method] - 1
        return left

    def to_test(self) -> list[Run]:
        """Chosen runs without test figures, once all are trained."""
        if self.left():
            return []
        return [
            run
            for method in self.methods
            for run in self.chosen(method)
            if 'test' not in self.runs[run.name] and not self.diverged(run)
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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample deviation; the latter is 0 of one value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread
