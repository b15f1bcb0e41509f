"""The training step of several runs on one pass, to be measured."""

from collections.abc import Mapping
from contextlib import nullcontext

from mmengine.config import Config
from torch import nn

from e3va_mm.measure import TrainingStep
from e3va_mm.sweep.shared_step import Run, train_step


class SharedStep(TrainingStep):
    """Builds several runs of a config and runs their common step.

    All begin with the same weights.

    Args:
        config (Config): A detection or segmentation config.
        *args: Those of ``TrainingStep``.
        runs (int): How many.
        **kwargs: Those of ``TrainingStep``.

    Raises:
        ConfigError: If the config's runs cannot share a pass, or as
            ``TrainingStep``.
    """

    def __init__(self, config: Config, *args, runs: int, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        found = [self._run(0, self)]
        for i in range(1, runs):
            found.append(self._run(i, TrainingStep(config, *args, **kwargs)))
            found[-1].share_trunk(found[0])
        self.model = _Models(found)
        self.optim_wrapper = _Optimizers(found)

    @staticmethod
    def _run(number: int, step: TrainingStep) -> Run:
        name = f'run {number}'
        return Run(name, step.model, step.optim_wrapper, nullcontext)


class _Models(nn.Module):
    """Steps all models; holds them for who counts bytes."""

    def __init__(self, runs: list[Run]) -> None:
        super().__init__()
        self._runs = runs
        self.runs = nn.ModuleList(run.model for run in runs)

    def train_step(self, data: Mapping, optim_wrapper: object) -> None:
        train_step(self._runs, data)


class _Optimizers:
    """The optimizers of all, as far as a measurement asks."""

    def __init__(self, runs: list[Run]) -> None:
        self._wrappers = [run.optim_wrapper for run in runs]

    @property
    def param_groups(self) -> list[dict]:
        return [g for each in self._wrappers for g in each.param_groups]

    def zero_grad(self) -> None:
        for each in self._wrappers:
            each.zero_grad()

    def state_dict(self) -> list[dict]:
        return [each.state_dict() for each in self._wrappers]
