"""One real training step of a config on generated input."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from e3va_mm.engine.activation_checkpointing import checkpoint_modules
from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.cpu_amp import CPUAmpOptimWrapper
from e3va_mm.measure.gpu_model import Launches, OneAttention
from e3va_mm.measure.inputs import (
    batch_size,
    generate_batch,
    image_size,
    set_image_size,
)
from e3va_mm.measure.kept import ModulePath, fold_paths
from e3va_mm.measure.live_bytes import LiveBytes
from e3va_mm.measure.on_meta import backbone_on_meta
from e3va_mm.measure.parts import Parts
from e3va_mm.measure.variants import framework, prepare_variant, variant_config
from e3va_mm.registry import install
from e3va_mm.utils import count_parameters
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.module_paths import parameters_of, select


class TrainingStep:
    """Builds a variant of a config and runs its training step.

    That is ``train_step`` of the model: data preprocessor, forward, losses,
    backward, clipping, update. Every step updates, whatever the config
    accumulates. An ``ActivationCheckpointHook`` and a ``FreezeHook`` among its
    ``custom_hooks`` apply, and so does mixed precision, in bfloat16 on CPU.

    Args:
        config (Config): A detection or segmentation config.
        variant (str): See ``VARIANTS``. Defaults to ``'as-is'``.
        size (tuple[int, int], optional): Height and width of the images in
            pixels. Defaults to that of the training pipeline.
        batch (int, optional): Images per step. Defaults to the config's.
        objects (int): Objects in an image, for detection. Defaults to 5.
        seed (int): Seed of weights, input and each step. Defaults to 0.
        device (str): ``'cpu'``, ``'cuda'``, ``'cuda:1'``... Defaults to
            ``'cpu'``.
        on_meta (bool): Whether the backbone is on the meta device, where it
            needs no memory: for :meth:`memory` alone. Gradients are not
            clipped then. Defaults to False.
        learn (bool): Whether the weights change. Without, the update has a
            learning rate of zero: heads that sample have the same work in
            every step. Defaults to True.

    Attributes:
        model (nn.Module): The detector or segmentor, in training mode.
        data (dict): The batch, on CPU as a data loader returns it.
        optim_wrapper (OptimWrapper): The config's.

    Raises:
        ConfigError: If the variant is unknown or not available for the
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
        learn: bool = True,
        on_meta: bool = False,
    ) -> None:
        install()
        config = variant_config(config, variant)
        if on_meta:
            backbone = config.model.backbone.to_dict()
            config.model.backbone = dict(
                type=backbone_on_meta, backbone=backbone
            )
        if size is None:
            size = image_size(config)
        else:
            set_image_size(config, size)
        batch = batch or batch_size(config)
        self.seed, self.device = seed, torch.device(device)
        self._has_run = False
        # Some heads ask the runner for these.
        MessageHub.get_current_instance().update_info_dict(
            dict(iter=0, epoch=0)
        )
        init_default_scope(config.get('default_scope') or framework(config))

        with _SameDraws(seed):
            model = MODELS.build(config.model)
            if not on_meta:  # where there is nothing to look at
                model.init_weights()
        # As a runner does where processes do not train together.
        model = revert_sync_batchnorm(model)
        if not on_meta:
            model = model.to(self.device)
        model.train()
        prepare_variant(model, variant)
        for hook in config.get('custom_hooks') or ():
            if class_name(hook) == 'ActivationCheckpointHook':
                checkpoint_modules(model, hook['modules'])
            elif class_name(hook) == 'FreezeHook':
                chosen = select(model, hook['freeze'])
                spared = select(model, hook.get('train', ()))
                frozen = parameters_of(*chosen.values())
                for p in frozen - parameters_of(*spared.values()):
                    p.requires_grad_(False)
        self.model = model
        self.optim_wrapper = build_optim_wrapper(
            model, _optim_config(config, self.device)
        )
        if on_meta:  # their norm would be on two devices
            self.optim_wrapper.clip_grad_kwargs = None
        if not learn:
            self._set_rates(0.0)
        set_random_seed(seed)
        self.data = generate_batch(config, model, batch, size, objects)

    def run(self) -> float:
        """Run the step once.

        The seed is set first, so that heads that sample do the same in every
        step.

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
                'Batch norm needs several values per channel, but this model '
                'pools an image to one and the batch is '
                f'{len(self.data["inputs"])}. Use at least 2 images '
                '(--batch 2).'
            ) from error
        self._synchronize()
        self._has_run = True
        return time.perf_counter() - start

    def memory(self) -> dict:
        """Account the memory of a step after the first.

        The first step creates the optimizer state. Gradients are dropped
        before the accounted step, as a step does itself. No weight changes.

        Returns:
            dict: Bytes. The accounted ``peak``, the most alive at any moment,
            is the sum of ``weights`` (with buffers), ``gradients``,
            ``optimizer`` state, activations ``kept`` for backward (with the
            batch) and ``temporaries`` at that moment. ``kept_modules`` is
            all that was kept when backward began, by module path, two names
            deep. On CUDA ``allocated`` and ``reserved`` are the most that
            torch's allocator held in this process, in a step of its own.
        """
        with self._after_first():
            return self._memory()

    def _memory(self) -> dict:
        allocator = {}
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.run()
            self.optim_wrapper.zero_grad()
            allocator = dict(
                allocated=torch.cuda.max_memory_allocated(self.device),
                reserved=torch.cuda.max_memory_reserved(self.device),
            )
        with (
            OneAttention(),
            ModulePath(self.model) as path,
            LiveBytes(self.model, self.optim_wrapper, path) as count,
        ):
            self.run()
        return dict(
            count.at_peak,
            peak=count.peak,
            kept_modules=fold_paths(count.kept_at_backward, 2),
            **allocator,
        )

    def launches(self) -> Launches:
        """Count what a step after the first launches on a GPU.

        It runs on this device, for what heads do depends on values, which the
        meta device has none of. On a CPU it takes the ways of a GPU: large
        chunks, torch's own products, updates of all weights at once; mixed
        precision is that of this step. No weight changes.

        Returns:
            Launches: By part of the model, see
            :class:`~e3va_mm.measure.parts.Parts`.
        """
        with (
            self._after_first(),
            _updates_at_once(self.optim_wrapper),
            Parts(self.model) as part,
            Launches(part) as counted,
        ):
            self.run()
        return counted

    @contextmanager
    def _after_first(self) -> Iterator[None]:
        """Inside, the optimizer has its state and changes no weight."""
        rates = [group['lr'] for group in self.optim_wrapper.param_groups]
        self._set_rates(0.0)
        if not self._has_run:
            self.run()
        self.optim_wrapper.zero_grad()
        yield
        self._set_rates(*rates)

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: all and trainable, of model and backbone.

        The backbone is the outermost module of that name, counted without
        what the tuner adds: a share is one of the stock backbone. Without a
        backbone its figures are zero.
        """
        total, trainable = count_parameters(self.model)
        backbones = (
            module
            for name, module in self.model.named_modules()
            if name.split('.')[-1] == 'backbone'
        )
        backbone = next(backbones, nn.Module())
        in_backbone, trainable_in_backbone = count_parameters(backbone)
        for name, child in backbone.named_children():
            if name in ('side_path', 'petl'):
                in_backbone -= count_parameters(child)[0]
        return dict(
            total=total,
            trainable=trainable,
            backbone=in_backbone,
            trainable_backbone=trainable_in_backbone,
        )

    def _set_rates(self, *rates: float) -> None:
        """Set the learning rates of all groups: one each, or one for all."""
        groups = self.optim_wrapper.param_groups
        if len(rates) == 1:
            rates *= len(groups)
        for group, rate in zip(groups, rates, strict=True):
            group['lr'] = rate

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


@contextmanager
def _updates_at_once(optim_wrapper: OptimWrapper) -> Iterator[None]:
    """Clip and update as torch does on a GPU, unless the config says how."""
    groups = [
        group
        for group in optim_wrapper.param_groups
        if group.get('foreach', True) is None and not group.get('fused')
    ]
    clip = optim_wrapper.clip_grad_kwargs
    if clip and clip.get('foreach') is None:
        groups.append(clip)
    for group in groups:
        group['foreach'] = True
    yield
    for group in groups:
        group['foreach'] = None


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


def _optim_config(config: Config, device: torch.device) -> dict:
    """The config's ``optim_wrapper``, with one update per step."""
    if 'optim_wrapper' not in config:
        raise ConfigError(
            f'{config.filename}: expected a training config with '
            '`optim_wrapper`, but it has none.'
        )
    wrapper = config.optim_wrapper.to_dict()
    wrapper.pop('accumulative_counts', None)
    if class_name(wrapper) == 'AmpOptimWrapper' and device.type == 'cpu':
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        wrapper['type'] = CPUAmpOptimWrapper
    return wrapper
