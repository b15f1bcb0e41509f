"""All checks by name, and how they are run."""

from collections.abc import Collection, Mapping
from typing import Any

from mmengine.config import Config
from torch import nn

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.preflight import classes, evaluation, files, labels, loops
from e3va_mm.preflight.problems import Problem, iter_datasets
from e3va_mm.preflight.reading import Datasets, ReadDataset

# Functions of config and data sets.
CHECKS = dict(
    loop=loops.check_loop,
    class_names=classes.check_class_names,
    categories=classes.check_categories,
    same_classes=classes.check_same_classes,
    class_weights=classes.check_class_weights,
    not_empty=classes.check_not_empty,
    metric_names=evaluation.check_metric_names,
    evaluator_files=evaluation.check_evaluator_files,
    boxes=labels.check_boxes,
    masks=labels.check_masks,
    files=files.check_files,
    image_sizes=files.check_image_sizes,
    map_sizes=files.check_map_sizes,
    batch_sizes=evaluation.check_batch_sizes,
    map_values=labels.check_map_values,
    labels=labels.check_labels,
)
# Functions of config, data sets and model.
MODEL_CHECKS = dict(
    heads=classes.check_heads, batch_norm=loops.check_batch_norm
)
NAMES = (*MODEL_CHECKS, *CHECKS)
# How long a start may look at images and maps: what is quick.
SECONDS = 3.0


def require_names(names: Collection[str]) -> tuple[str, ...]:
    """Raise ConfigError unless all are names of checks."""
    wrong = [name for name in names if name not in NAMES]
    if wrong or isinstance(names, str):
        raise ConfigError(
            f'`skip` should be a list of checks ({", ".join(NAMES)}), but got '
            f'{names!r}.'
        )
    return tuple(names)


def opened(
    loaded: Mapping[str, Any],
    seconds: float | None = None,
    shows: bool = False,
) -> dict[str, ReadDataset]:
    """The data sets that read files, inside of those of the loaders.

    Args:
        loaded (Mapping[str, object]): Data sets by ``'train_dataloader'``...
        seconds (float, optional): How long to look at all their images and
            maps; as many as it takes by default.
        shows (bool): Whether to show the progress.
    """
    found = {
        option: (each, len(dataset))
        for loader, dataset in loaded.items()
        for option, each in iter_datasets(dataset, f'{loader}.dataset')
    }
    share = seconds and seconds / (2 * max(len(found), 1))
    return {
        option: ReadDataset(option, each, share, count, shows)
        for option, (each, count) in found.items()
    }


def run_checks(
    config: Config,
    datasets: Datasets,
    model: nn.Module | None = None,
    skip: Collection[str] = (),
) -> list[Problem]:
    """What the checks find; one that fails itself is a warning.

    Args:
        config (Config): That of the run.
        datasets (Datasets): See :func:`opened`.
        model (nn.Module, optional): Without it, its checks are left out.
        skip (Collection[str]): Names of checks to leave out.
    """
    problems = []
    checks = {**(MODEL_CHECKS if model is not None else {}), **CHECKS}
    for name, check in checks.items():
        if name in skip:
            continue
        more = (model,) if name in MODEL_CHECKS else ()
        try:
            for problem in check(config, datasets, *more):
                problems.append(problem._replace(check=name))
        except E3VAError:
            raise
        except Exception as error:
            problems.append(
                Problem(
                    f'the check {name!r}',
                    f'failed itself ({type(error).__name__}: {error})',
                    'data that it knows',
                    'The run goes on without it.',
                    severity='warning',
                    check=name,
                )
            )
    return problems
