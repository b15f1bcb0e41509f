import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine._strategy import DeepSpeedStrategy
from torch import nn

from ...errors import ConfigError
from ...registry import STRATEGIES

INSTALL = 'pip install "deepspeed<0.19"'


@STRATEGIES.register_module()
class E3VADeepSpeedStrategy(DeepSpeedStrategy):
    """mmengine's DeepSpeedStrategy, for models with a frozen trunk.

    ZeRO of stage 1 or 2 spreads what training adds to the weights, the
    gradients and the optimizer's state, over the processes. Frozen weights
    have neither and are on every process. To spread the trunk itself take the
    :class:`E3VAFSDPStrategy`.

    Checkpoints are folders of DeepSpeed's, for ``--resume`` alone; adapter
    files are written beside and are taken anywhere.

    Args:
        zero_optimization (Mapping, optional): DeepSpeed's own, with a
            ``stage`` of up to 2.
        config (Mapping | str, optional): A config of DeepSpeed, or the path
            of one in JSON.
        **kwargs: Those of mmengine's ``DeepSpeedStrategy``.

    Raises:
        ConfigError: If an option cannot work with a frozen trunk, or
            DeepSpeed is missing or too new for mmengine.

    Examples:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(
        ...     type='e3va_mm.E3VADeepSpeedStrategy',
        ...     zero_optimization=dict(stage=2))
        >>> optim_wrapper = dict(type='DeepSpeedOptimWrapper', ...)
    """

    def __init__(
        self,
        *,
        zero_optimization: Mapping | None = None,
        config: Mapping | str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(config, str):
            config = _read(config)
        zero = zero_optimization or (config or {}).get('zero_optimization')
        stage = (zero or {}).get('stage', 0)
        if stage not in (0, 1, 2):
            raise ConfigError(
                '`strategy.zero_optimization.stage` should be 0, 1 or 2, but '
                f'got {stage!r}. Stage 3 would take the weights away from '
                'under the frozen trunk; to spread these use '
                "`strategy=dict(type='e3va_mm.E3VAFSDPStrategy')`."
            )
        if kwargs.get('exclude_frozen_parameters'):
            raise ConfigError(
                '`strategy.exclude_frozen_parameters` leaves checkpoints '
                'without the trunk, and no run can go on from them. Leave it '
                'out; files without a trunk are written by the '
                'e3va_mm.AdapterCheckpointHook.'
            )
        if importlib.util.find_spec('deepspeed') is None:
            raise ConfigError(
                'The config trains with DeepSpeed, which is not installed. '
                f'Install it ({INSTALL}), or leave out `strategy`.'
            )
        try:
            super().__init__(
                zero_optimization=zero_optimization, config=config, **kwargs
            )
        except ImportError as error:
            raise ConfigError(
                'DeepSpeed is installed, but mmengine cannot use it: '
                f'{error}. Take an older one: {INSTALL}'
            ) from error

    def prepare(
        self, model: nn.Module | dict, *, dispatch_kwargs: dict, **kwargs: Any
    ):
        """Prepare what is to be run; see the base class.

        Raises:
            ConfigError: If no launcher has started the process.
        """
        if not self.distributed:
            raise ConfigError(
                'DeepSpeed runs in processes of a launcher, be it one alone: '
                'bash tools/dist_train.sh CONFIG GPUS'
            )
        # The runner tells it to mmengine's own class alone.
        self.config.setdefault(
            'train_micro_batch_size_per_gpu',
            dispatch_kwargs.get('train_micro_batch_size_per_gpu', 1),
        )
        return super().prepare(
            model, dispatch_kwargs=dispatch_kwargs, **kwargs
        )

    def _wrap_model(self, model: nn.Module):
        wrapper = super()._wrap_model(model)
        engine = wrapper.model
        # It gathers into views of a split, which torch refuses by now where
        # gradients are recorded.
        engine.step = torch.no_grad()(engine.step)
        return wrapper

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict:
        """Load a folder that DeepSpeed has written.

        Raises:
            ConfigError: If it is a file.
        """
        if not os.path.isdir(filename):
            raise ConfigError(
                f'{filename} is no folder that DeepSpeed has written, and it '
                'loads nothing else. To test or start from a file, use the '
                'config without `strategy` and `runner_type`.'
            )
        return super().load_checkpoint(filename, **kwargs)


def _read(path: str) -> dict:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'`strategy.config` should be a dict, or the path of a JSON file '
            f'with one, but {path} cannot be read: {error}.'
        ) from error
