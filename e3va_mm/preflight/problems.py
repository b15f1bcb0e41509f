"""What a check finds, and how it is reported.

A check is a function ``(config, datasets) -> Problems``; ``datasets`` maps
config options to the data sets that read files, each a
:class:`~e3va_mm.preflight.reading.ReadDataset`.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from mmengine.logging import print_log

from e3va_mm.errors import ConfigError, DataError, E3VAError

SHOWN = 10  # problems of one kind that a report lists


class Problem(NamedTuple):
    """Something in the config or the data that will go wrong.

    Attributes:
        where (str): The config option or the file.
        found (str): What is there.
        expected (str): What should be there.
        advice (str): What to do, a sentence.
        severity (str): ``'error'``, or ``'warning'`` for what may be meant.
        error (type[E3VAError]): What an error is raised as.
        check (str): The name of the check that found it.
    """

    where: str
    found: str
    expected: str
    advice: str
    severity: str = 'error'
    error: type[E3VAError] = DataError
    check: str = ''

    def __str__(self) -> str:
        return f'{self.where}: {self.found}; expected {self.expected}.'

    @property
    def hint(self) -> str:
        """What to do, and the check that can be switched off."""
        return self.advice + f' (check: {self.check})' * bool(self.check)


Problems = Iterator[Problem]
warning = partial(Problem, severity='warning')
# Of options, whatever the files are.
option_problem = partial(Problem, error=ConfigError)


def grouped(
    problems: Iterable[Problem],
) -> Iterator[tuple[list[Problem], int]]:
    """Problems with the same hint: the first of them, and how many more."""
    groups: dict[str, list[Problem]] = {}
    for each in problems:
        groups.setdefault(each.hint, []).append(each)
    for group in groups.values():
        yield group[:SHOWN], max(0, len(group) - SHOWN)


def report(problems: Iterable[Problem]) -> str:
    """Problems as text, those with the same advice together."""
    lines = []
    for group, more in grouped(problems):
        lines += [*map(str, group), *[f'... and {more:,} more'] * bool(more)]
        lines.append(group[0].hint)
    return '\n'.join(lines)


def raise_errors(
    problems: Iterable[Problem], cause: BaseException | None = None
) -> None:
    """Log the warnings among problems, a line each, and raise the errors.

    Args:
        problems (Iterable[Problem]): What checks have found.
        cause (BaseException, optional): What failed because of it.

    Raises:
        E3VAError: If one is an error; of the type of the first, with all in
            its text.
    """
    problems = list(problems)
    errors = [p for p in problems if p.severity == 'error']
    for group, more in grouped(p for p in problems if p.severity != 'error'):
        texts = [f'{each} {each.hint}' for each in group]
        texts += [f'{more:,} more (check: {group[0].check})'] * bool(more)
        for text in texts:
            print_log(f'warning: {text}', 'current', level=logging.WARNING)
    if errors:
        raise errors[0].error(report(errors)) from cause


def iter_datasets(dataset: Any, option: str) -> Iterator[tuple[str, Any]]:
    """Data sets that read files, or their configs, inside of wrappers.

    Yields:
        tuple[str, Any]: The config option and the data set.
    """
    is_config = isinstance(dataset, dict)
    several, tasks, one = (
        dataset.get(name) if is_config else getattr(dataset, name, None)
        for name in ('datasets', 'tasks', 'dataset')
    )
    inner = {f'datasets.{i}': each for i, each in enumerate(several or ())}
    inner |= {f'tasks.{name}': each for name, each in (tasks or {}).items()}
    if one is not None:
        inner['dataset'] = one
    for name, each in inner.items():
        yield from iter_datasets(each, f'{option}.{name}')
    if not inner and (is_config or hasattr(dataset, 'get_data_info')):
        yield option, dataset
