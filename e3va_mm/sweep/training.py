"""Training of runs in turns, each from where it was left."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from mmengine.config import Config

from e3va_mm.sweep.together import Together
from e3va_mm.utils.files import newest_whole


def turns_of(configs: Mapping[str, Config], at_once: int) -> list[list[str]]:
    """Which runs train together.

    Those that begin at the same iteration do: runs that a kill has left at
    different ones go on apart.

    Args:
        configs (Mapping[str, Config]): The configs by the name of the run.
        at_once (int): How many train together at most.
    """
    begins = defaultdict(list)
    for name, config in configs.items():
        checkpoint = _checkpoint(config)
        begins[checkpoint and checkpoint.name].append(name)
    return [
        names[start : start + at_once]
        for names in begins.values()
        for start in range(0, len(names), at_once)
    ]


def train_together(
    configs: Mapping[str, Config],
    seed: int,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    on_validation: Callable[[str, dict], None] | None = None,
) -> dict[str, str]:
    """Train the runs of one turn, from their newest checkpoints on.

    Args:
        configs (Mapping[str, Config]): The configs by the name of the run;
            each has a ``work_dir``.
        seed (int): See :class:`Together`, as the rest.
        on_step (Callable, optional): See there.
        on_validation (Callable, optional): See there.

    Returns:
        dict[str, str]: The runs that have diverged, and how.

    Raises:
        ConfigError: If the runs cannot share a pass.
    """
    for name, config in configs.items():
        config.experiment_name = name
        if config.get('visualizer'):
            # One with the name of another would be that one.
            config.visualizer.name = config.work_dir
        checkpoint = _checkpoint(config)
        if checkpoint is not None:
            config.resume, config.load_from = True, str(checkpoint)
    return Together(configs, seed, on_step, on_validation).run()


def _checkpoint(config: Config) -> Path | None:
    """Where a run goes on from, if it has begun."""
    folder = Path(config.work_dir)
    if not (folder / 'last_checkpoint').is_file():
        return None
    return newest_whole(folder)
