"""The step of several runs: one pass of the trunk, and each run's own part."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.errors import ConfigError
from e3va_mm.utils.tuned import side_path_backbones


class Run:
    """What one run brings to a step.

    Args:
        name (str): For messages.
        model (nn.Module): Has one backbone with a side path.
        optim_wrapper (OptimWrapper): Of what trains in it.
        scope (Callable): Gives a context that the run's own part is within:
            its random numbers, its logger...

    Attributes:
        backbone (TunedBackbone): The backbone of the model.

    Raises:
        ConfigError: If the model cannot share a pass.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optim_wrapper: OptimWrapper,
        scope: Callable[[], AbstractContextManager],
    ) -> None:
        self.name, self.model = name, model
        self.optim_wrapper, self.scope = optim_wrapper, scope
        kind = type(model)
        backbones = [backbone for _, backbone in side_path_backbones(model)]
        if len(backbones) != 1:
            raise ConfigError(
                f'{name}: expected a model with one backbone whose tuner is '
                f'a side path, but {kind.__name__} has {len(backbones)}. Runs '
                'with other tuners train apart: `e3va train`, `e3va compare`.'
            )
        self.backbone = backbones[0]
        for step in ('train_step', 'val_step'):
            if getattr(kind, step, None) is not getattr(BaseModel, step):
                raise ConfigError(
                    f'{name}: expected a model whose `{step}` is that of '
                    f'mmengine, but {kind.__name__} has its own. Train it '
                    'apart: `e3va train`.'
                )
        rate = self.backbone.trunk.options.drop_path
        if rate:
            raise ConfigError(
                f'{name}: expected a trunk that draws no random numbers, but '
                f'`tuner.trunk_drop_path` is {rate}. Set it to 0, or train '
                'apart: `e3va train`.'
            )

    def share_trunk(self, other: 'Run') -> None:
        """Drop the own trunk, run on that of another run.

        Raises:
            ConfigError: If the trunks, or their weights, differ.
        """
        try:
            self.backbone.share_trunk(_same_weights(self, other))
        except ConfigError as error:
            raise ConfigError(
                f'{other.name} and {self.name}: {error}'
            ) from error


def _same_weights(one: Run, other: Run) -> nn.Module:
    """The backbone of ``other``, whose trunk has the weights of ``one``'s."""
    found = [run.backbone.trunk_fingerprint() for run in (one, other)]
    if found[0] != found[1]:
        raise ConfigError(
            'Expected trunks with the same weights, but they are '
            f'{found[1][:16]} ({other.backbone.trunk_source or "random"}) '
            f'and {found[0][:16]} ({one.backbone.trunk_source or "random"}). '
            'Set one `model.backbone.init_cfg` for all; a random trunk '
            'depends on the seed.'
        )
    return other.backbone


def train_step(
    runs: Sequence[Run], data: Mapping
) -> list[tuple[Run, dict[str, Tensor]]]:
    """Train all runs on a batch, as ``train_step`` of each model would.

    Args:
        runs (Sequence[Run]): They share a trunk, and their data preprocessors
            are equal.
        data (Mapping): What the data loader gives.

    Returns:
        list[tuple[Run, dict]]: Of each run the values to log.
    """
    with runs[0].optim_wrapper.optim_context(runs[0].model):
        batch, outputs = _pass(runs, data, training=True)
    found = []
    for run in runs:
        model, wrapper = run.model, run.optim_wrapper
        with run.scope():
            with wrapper.optim_context(model):
                losses = _own(run, batch, outputs.pop(0), 'loss')
            loss, log = model.parse_losses(losses)
            # Backward frees what the run has kept before the next one's.
            del losses
            wrapper.update_params(loss)
        found.append((run, log))
    return found


def val_step(runs: Sequence[Run], data: Mapping) -> list[tuple[Run, list]]:
    """Have all runs predict for a batch; see :func:`train_step`."""
    batch, outputs = _pass(runs, data, training=False)
    found = []
    for run in runs:
        with run.scope():
            predicted = _own(run, batch, outputs.pop(0), 'predict')
            found.append((run, predicted))
    return found


def _pass(
    runs: Sequence[Run], data: Mapping, training: bool
) -> tuple[dict, list[tuple[Tensor, ...]]]:
    """The prepared batch, and what the backbones give for it."""
    batch = runs[0].model.data_preprocessor(data, training)
    backbones = [run.backbone for run in runs]
    return batch, run_trunk(backbones, batch['inputs'])


def _own(
    run: Run, batch: Mapping, outputs: tuple[Tensor, ...], mode: str
) -> Any:
    """What a model makes of the batch, from its backbone's outputs on."""
    image = batch['inputs']
    # Models write into the samples: what they predict, for one.
    rest = {k: copy.deepcopy(v) for k, v in batch.items() if k != 'inputs'}
    with run.backbone.given(image, outputs):
        return run.model(inputs=image, **rest, mode=mode)
