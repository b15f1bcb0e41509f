"""What a check finds, and how it is reported.

A check is a function ``(config, datasets) -> Iterator[Problem]``; ``datasets``
maps config options to the data sets that read files, each a
:class:`~e3va_mm.preflight.reading.ReadDataset`.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mmengine.logging import print_log

from e3va_mm.errors import DataError, E3VAError

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


def report(problems: Iterable[Problem]) -> str:
    """Problems as text, those with the same advice together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        key = problem.advice, problem.check
        groups.setdefault(key, []).append(str(problem))
    lines = []
    for (advice, check), group in groups.items():
        more = len(group) - SHOWN
        lines += group[:SHOWN]
        lines += [f'... and {more:,} more'] if more > 0 else []
        lines.append(f'{advice} (check: {check})' if check else advice)
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
    counts: Counter = Counter()
    for problem in problems:
        if problem.severity == 'error':
            continue
        counts[problem.check] += 1
        if counts[problem.check] <= SHOWN:
            text = ' '.join([str(problem), *report([problem]).split('\n')[1:]])
            print_log(f'warning: {text}', 'current', level=logging.WARNING)
    for check, count in counts.items():
        if count > SHOWN:
            print_log(
                f'warning: {count - SHOWN:,} more (check: {check})',
                'current',
                level=logging.WARNING,
            )
    if errors:
        raise errors[0].error(report(errors)) from cause


def iter_datasets(dataset: Any, option: str) -> Iterator[tuple[str, Any]]:
    """Data sets that read files, or their configs, inside of wrappers.

    Yields:
        tuple[str, Any]: The config option and the data set.
    """
    is_config = isinstance(dataset, dict)

    def get(name: str) -> Any:
        if is_config:
            return dataset.get(name)
        return getattr(dataset, name, None)

    inner = {f'datasets.{i}': d for i, d in enumerate(get('datasets') or ())}
    inner |= {f'tasks.{n}': d for n, d in (get('tasks') or {}).items()}
    if get('dataset') is not None:
        inner['dataset'] = get('dataset')
    for name, each in inner.items():
        yield from iter_datasets(each, f'{option}.{name}')
    if not inner and (is_config or hasattr(dataset, 'get_data_info')):
        yield option, dataset
