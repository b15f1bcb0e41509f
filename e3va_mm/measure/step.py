"""One real training step of a config on generated input."""

import time
from collections.abc import Iterable
from itertools import cycle

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from e3va_mm.errors import ConfigError
from e3va_mm.measure.cpu_amp import CPUAmpOptimWrapper
from e3va_mm.measure.inputs import (
    batch_size,
    generate_batch,
    image_size,
    set_image_size,
)
from e3va_mm.measure.kept import ModulePath, fold_paths
from e3va_mm.measure.live_bytes import LiveBytes
from e3va_mm.measure.variants import framework, prepare_variant, variant_config
from e3va_mm.utils import count_parameters

CHECKPOINT_HOOK = 'ActivationCheckpointHook'


class TrainingStep:
    """Builds a variant of a config and runs its training step.

    That is ``train_step`` of the model: data preprocessor, forward, losses,
    backward, clipping, update. What the config accumulates over several
    iterations is dropped: each step updates. An ``ActivationCheckpointHook``
    among its ``custom_hooks`` is heeded.

    Args:
        config (Config): A detection or segmentation config.
        variant (str): See ``VARIANTS``. Defaults to ``'as-is'``.
        size (tuple[int, int], optional): Height and width of the pictures in
            pixels. Defaults to that of the training pipeline.
        batch (int, optional): Pictures a step. Defaults to the config's.
        objects (int): Objects in a picture, for detection. Defaults to 5.
        seed (int): Seed of weights, input and each step. Defaults to 0.
        device (str): ``'cpu'``, ``'cuda'``, ``'cuda:1'``... Defaults to
            ``'cpu'``.
        amp (bool): Train in mixed precision, also if the config does not:
            float16 on CUDA, bfloat16 on CPU. Defaults to False.
        learn (bool): Whether the weights change. Without, the update is done
            at a learning rate of zero: heads that draw samples have the same
            work in every step. Defaults to True.

    Attributes:
        model (nn.Module): The detector or segmentor, in training mode.
        data (dict): The batch, on CPU as a data loader gives it.
        optim_wrapper (OptimWrapper): The config's.

    Raises:
        ConfigError: If the variant is unknown or not to be had of the
            backbone, or the config has no size, batch or known model.
    """

    def __init__(
        self,
        config: Config,
        variant: str = 'as-is',
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        objects: int = 5,
        seed: int = 0,
        device: str = 'cpu',
        amp: bool = False,
        learn: bool = True,
    ) -> None:
        config = variant_config(config, variant)
        if size is None:
            size = image_size(config)
        else:
            set_image_size(config, size)
        batch = batch or batch_size(config)
        self.seed, self.device = seed, torch.device(device)
        # What some heads ask the runner for.
        MessageHub.get_current_instance().update_info_dict(
            dict(iter=0, epoch=0)
        )
        init_default_scope(config.get('default_scope') or framework(config))

        with _SameDraws(seed):
            model = MODELS.build(config.model)
            model.init_weights()
        # As a runner does where processes do not train together.
        model = revert_sync_batchnorm(model).to(self.device)
        model.train()
        prepare_variant(model, variant)
        _checkpoint_activations(model, config)
        self.model = model
        self.optim_wrapper = build_optim_wrapper(
            model, _optim_config(config, self.device, amp)
        )
        if not learn:
            _set_rates(self.optim_wrapper, [0.0])
        set_random_seed(seed)
        self.data = generate_batch(config, model, batch, size, objects)

    def run(self) -> float:
        """Run the step once.

        Heads draw samples: the seed is set before each step, so that steps
        are alike.

        Returns:
            float: Seconds of forward, backward and update together.

        Raises:
            ConfigError: If batch norm would see a single value.
        """
        set_random_seed(self.seed)
        self._synchronize()
        start = time.perf_counter()
        try:
            self.model.train_step(self.data, self.optim_wrapper)
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise ConfigError(
                'Batch norm needs several values of a channel, but this model '
                'pools a picture to one and the batch is '
                f'{len(self.data["inputs"])}. Take at least 2 pictures '
                '(--batch 2).'
            ) from error
        self._synchronize()
        return time.perf_counter() - start

    def memory(self) -> dict:
        """Account the memory of a step after the first.

        The first step makes the optimizer state. Gradients are dropped before
        the accounted step, as a step does itself. No weight changes.

        Returns:
            dict: Bytes. The accounted ``peak``, the most that was alive at
            any moment, is the sum of ``weights`` (buffers too),
            ``gradients``, ``optimizer`` state, ``kept`` for backward (the
            batch too) and ``temporaries`` at that moment. ``kept_modules`` is
            all that was kept when backward began, by module path, two names
            deep. On CUDA ``allocated`` and ``reserved`` are what torch's
            allocator held at most in this process, in a step of its own.
        """
        rates = [g['lr'] for g in self.optim_wrapper.param_groups]
        _set_rates(self.optim_wrapper, [0.0])
        self.run()
        self.optim_wrapper.zero_grad()
        allocator = self._allocator_figures()
        with (
            ModulePath(self.model) as path,
            LiveBytes(self.model, self.optim_wrapper, path) as count,
        ):
            self.run()
        _set_rates(self.optim_wrapper, rates)
        return dict(
            count.at_peak,
            peak=count.peak,
            kept_modules=fold_paths(count.kept_at_backward, 2),
            **allocator,
        )

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: all and trainable, model and backbone.

        The backbone is the outermost module of that name, counted without
        what was added to it: a share is one of the stock backbone. Without a
        backbone its figures are zero.
        """
        total, trainable = count_parameters(self.model)
        backbones = [
            module
            for name, module in self.model.named_modules()
            if name.split('.')[-1] == 'backbone'
        ]
        backbone = backbones[0] if backbones else nn.Module()
        in_backbone, trainable_in_backbone = count_parameters(backbone)
        added = getattr(backbone, getattr(backbone, 'ADDED', ''), nn.Module())
        in_backbone -= count_parameters(added)[0]
        return dict(
            total=total,
            trainable=trainable,
            backbone=in_backbone,
            trainable_backbone=trainable_in_backbone,
        )

    def _allocator_figures(self) -> dict[str, int]:
        """Those of torch's allocator, of one step; none but on CUDA."""
        if self.device.type != 'cuda':
            return {}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run()
        self.optim_wrapper.zero_grad()
        return dict(
            allocated=torch.cuda.max_memory_allocated(self.device),
            reserved=torch.cuda.max_memory_reserved(self.device),
        )

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


class _SameDraws(TorchDispatchMode):
    """Lets what is drawn depend on its shape and on nothing drawn before.

    So all variants of a model begin with the same weights in what they share.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(self.seed)
        return func(*args, **(kwargs or {}))


def _set_rates(optim_wrapper: OptimWrapper, rates: Iterable[float]) -> None:
    """Set the learning rates of all groups, one for each or one for all."""
    for group, rate in zip(
        optim_wrapper.param_groups, cycle(rates), strict=False
    ):
        group['lr'] = rate


def _optim_config(config: Config, device: torch.device, amp: bool) -> dict:
    """The config's ``optim_wrapper``, with one update a step."""
    if 'optim_wrapper' not in config:
        raise ConfigError(
            f'{config.filename}: expected a training config with '
            '`optim_wrapper`, but it has none.'
        )
    wrapper = config.optim_wrapper.to_dict()
    wrapper.pop('accumulative_counts', None)
    kind = wrapper.get('type', 'OptimWrapper')
    if 'DeepSpeedOptimWrapper' in str(kind):  # one process has no use for it
        kind = wrapper['type'] = 'OptimWrapper'
    is_amp = 'AmpOptimWrapper' in str(kind)
    if (amp or is_amp) and device.type == 'cpu':
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        wrapper['type'] = CPUAmpOptimWrapper
    elif amp and not is_amp:
        wrapper.update(type='AmpOptimWrapper', dtype='float16')
    return wrapper


def _checkpoint_activations(model: nn.Module, config: Config) -> None:
    """Do before the first step what the config's hook does."""
    for hook in config.get('custom_hooks') or ():
        kind = hook.get('type', '')
        name = kind.__name__ if isinstance(kind, type) else kind
        if name.split('.')[-1] == CHECKPOINT_HOOK:
            from e3va_mm.engine.checkpointing import checkpoint_modules

            checkpoint_modules(model, hook['modules'])
