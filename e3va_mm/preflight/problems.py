"""What a check finds, and how it is reported.

A check is a function ``(config, datasets) -> Iterator[Problem]``; ``datasets``
maps config options to the data sets that read files.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log

from e3va_mm.errors import DataError, E3VAError

SHOWN = 10  # problems of one kind that a report lists


@dataclass(frozen=True)
class Problem:
    """Something in the config or the data that will go wrong.

    Attributes:
        where (str): The config option or the file.
        found (str): What is there.
        expected (str): What should be there.
        advice (str): What to do, a sentence.
        severity (str): ``'error'``, or ``'warning'`` for what may be meant.
        error (type[E3VAError]): What an error is raised as.
    """

    where: str
    found: str
    expected: str
    advice: str
    severity: str = 'error'
    error: type[E3VAError] = DataError

    def __str__(self) -> str:
        return f'{self.where}: {self.found}; expected {self.expected}.'


def report(problems: Iterable[Problem]) -> str:
    """Problems as text, those with the same advice together."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.advice, []).append(problem)
    lines = []
    for advice, group in groups.items():
        lines += map(str, group[:SHOWN])
        if len(group) > SHOWN:
            lines.append(f'... and {len(group) - SHOWN:,} more')
        lines.append(advice)
    return '\n'.join(lines)


def raise_errors(
    problems: Iterable[Problem], cause: Exception | None = None
) -> None:
    """Log the warnings among problems and raise the errors.

    Args:
        problems (Iterable[Problem]): What checks have found.
        cause (Exception, optional): What failed because of it.

    Raises:
        E3VAError: If one is an error; of the type of the first, with all in
            its text.
    """
    problems = list(problems)
    errors = [p for p in problems if p.severity == 'error']
    warnings = [p for p in problems if p.severity != 'error']
    if warnings:
        print_log(report(warnings), 'current', level=logging.WARNING)
    if errors:
        raise errors[0].error(report(errors)) from cause


def iter_datasets(dataset: Any, option: str) -> Iterator[tuple[str, Any]]:
    """Data sets that read files, inside of wrappers, with their options.

    Args:
        dataset (Any): A data set, or the config of one.
        option (str): Its config option.
    """

    def inside(name: str) -> Any:
        if isinstance(dataset, dict):
            return dataset.get(name)
        return getattr(dataset, name, None)

    if inside('datasets') is not None:
        inner = {f'datasets.{i}': d for i, d in enumerate(inside('datasets'))}
    elif inside('dataset') is not None:
        inner = {'dataset': inside('dataset')}
    elif inside('tasks') is not None:
        inner = {f'tasks.{name}': d for name, d in inside('tasks').items()}
    else:
        if isinstance(dataset, dict) or hasattr(dataset, 'get_data_info'):
            yield option, dataset
        return
    for name, each in inner.items():
        yield from iter_datasets(each, f'{option}.{name}')
