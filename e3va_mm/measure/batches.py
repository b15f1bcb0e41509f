"""The largest batch whose training step fits a card."""

import math
from bisect import bisect
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.utils import import_modules_from_strings

from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.measure.fits import (
    CONTEXT,
    FLOAT,
    SMALLEST_BATCH,
    averaged_bytes,
    needed_bytes,
    updated_at_once,
)
from e3va_mm.measure.inputs import Size, batch_size, largest_size
from e3va_mm.measure.own_process import in_own_process
from e3va_mm.measure.step import TrainingStep
from e3va_mm.measure.variants import framework
from e3va_mm.preflight.loops import schedulers_of
from e3va_mm.preflight.problems import iter_datasets
from e3va_mm.utils.sizes import GIB

# COCO's fullest training image has 93.
ASSUMED_OBJECTS = 100
# Transforms that put several images into one.
MIXES = dict(Mosaic=4, CachedMosaic=4, MixUp=2, CachedMixUp=2, CopyPaste=2)
# Of schedulers, what counts iterations or epochs.
COUNTS = (
    *('begin', 'end', 'T_max', 'milestones', 'periods', 'step_size'),
    *('total_iters', 'total_steps'),
)


class Batch(NamedTuple):
    """A batch, and what its step needs.

    Attributes:
        images (int): Images of an iteration.
        counts (int): Iterations of an update.
        size (tuple[int, int]): Height and width that were assumed.
        needs (float): Bytes of a card.
    """

    images: int
    counts: int
    size: Size
    needs: float


class BatchSearch:
    """Finds the largest batch that fits, with the config's images an update.

    Batches are the divisors of ``batch_size`` times ``accumulative_counts``.
    Steps are measured, each in a process of its own, with the largest images
    and the most objects that the pipeline can produce, the state of the
    optimizer, averaged weights and, while gradients are accumulated, these.

    Args:
        config (Config): A training config.
        device (str): Where to measure. On CUDA a batch that is found has run
            within the limit of the card. Defaults to ``'cpu'``.
        size (tuple[int, int], optional): Height and width instead of those of
            the pipeline.
        prepare (Callable, optional): Called first in each process; picklable.

    Attributes:
        total (int): Images of an update.
        objects (int): Objects of an image that are assumed.
        objects_from (str): Where their number is from.
    """

    def __init__(
        self,
        config: Config,
        device: str = 'cpu',
        size: Size | None = None,
        prepare: Callable[[], None] = keep_freed_memory,
    ) -> None:
        self.config, self.device = config, device
        counts = config.optim_wrapper.get('accumulative_counts', 1)
        self.total = batch_size(config) * counts
        self.objects, self.objects_from = most_objects(config)
        self._size, self._prepare = size, prepare
        self.measured = cache(self._measured)

    def sizes(self) -> list[int]:
        """The batches that may be, ascending."""
        least = SMALLEST_BATCH.get(framework(self.config), 1)
        divisors = [n for n in range(1, self.total + 1) if not self.total % n]
        return [n for n in divisors if n >= least] or [self.total]

    def largest(self, gigabytes: float) -> Batch:
        """The largest batch for a card.

        Raises:
            ConfigError: If not even the smallest fits.
        """
        sizes, limit = self.sizes(), gigabytes * GIB
        count = bisect(sizes, limit, key=lambda n: self.measured(n).needs)
        while count and not self._runs(sizes[count - 1], limit):
            count -= 1
        if not count:
            least = self.measured(sizes[0])
            raise ConfigError(
                f'Expected the smallest batch of {self.config.filename}, '
                f'{least.images} of {least.size[0]}x{least.size[1]}, to fit '
                f'{gigabytes:g} GB, but it needs {least.needs / GIB:.2f}. '
                'See what to change: e3va measure --memory-only --batch '
                f'{least.images} --fits {gigabytes:g}.'
            )
        return self.measured(sizes[count - 1])

    def assumed(self) -> str:
        """What was assumed, as words for a message."""
        size = 'given' if self._size else 'largest'
        return (
            f'images of the {size} size, {self.objects} objects each '
            f'({self.objects_from})'
        )

    def _measured(self, images: int) -> Batch:
        size = self._size or largest_size(self.config, images)
        memory, parameters = self._apart(images, size)
        counts = self.total // images
        needs = math.inf
        if memory:
            needs = needed_bytes(
                memory,
                updated_at_once(self.config, parameters),
                averaged_bytes(self.config, memory, parameters),
            )
            if counts > 1:  # gradients wait while activations are kept
                gradients = FLOAT * parameters['trainable']
                needs += max(0, gradients - memory['gradients'])
        return Batch(images, counts, size, needs)

    def _runs(self, images: int, limit: float) -> bool:
        """Whether CUDA runs the step within a limit; elsewhere it is true."""
        if torch.device(self.device).type != 'cuda':
            return True
        whole = torch.cuda.get_device_properties(self.device).total_memory
        share = min(1.0, max(0.0, limit - CONTEXT) / whole)
        return bool(self._apart(images, self.measured(images).size, share)[0])

    def _apart(self, images: int, size: Size, share: float = 1) -> tuple:
        """Figures of a step; none of memory if the card was too small."""
        arguments = (images, size, self.objects, self.device, share)
        return in_own_process(
            figures,
            self.config,
            *arguments,
            killed=f'Measuring a batch of {images} was killed: most likely '
            'it needs more memory than this machine has. Set '
            '`train_dataloader.batch_size` to a smaller batch.',
            prepare=self._prepare,
        )


def figures(
    config: Config,
    images: int,
    size: Size,
    objects: int,
    device: str,
    share: float,
) -> tuple[Mapping, Mapping]:
    """Memory and parameters of a step.

    Args:
        config (Config): The config.
        images (int): Images of the step.
        size (tuple[int, int]): Their height and width.
        objects (int): Objects of each.
        device (str): Where to run.
        share (float): The part of a CUDA device that may be used. Below 1 the
            step is run once and no more.

    Returns:
        tuple[Mapping, Mapping]: See :class:`TrainingStep`; empty mappings if
        the device has too little memory.
    """
    if config.get('custom_imports'):  # a copy of a config runs none
        import_modules_from_strings(**config.custom_imports)
    if torch.device(device).type == 'cuda':
        torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        step = TrainingStep(
            config,
            size=size,
            batch=images,
            objects=objects,
            device=device,
            learn=False,
        )
        if share < 1:
            step.run()  # makes the state of the optimizer
            return dict(seconds=step.run()), step.parameters()
        return step.memory(), step.parameters()
    except torch.cuda.OutOfMemoryError:
        return {}, {}


def most_objects(config: Config) -> tuple[int, str]:
    """The most objects that an image of the training set can have.

    Args:
        config (Config): A training config.

    Returns:
        tuple[int, str]: Their number, and where it is from, in words.
    """
    scope = framework(config)
    if scope != 'mmdet':
        return 0, f'{scope} has none'
    with DefaultScope.overwrite_default_scope(scope):
        try:
            dataset = DATASETS.build(config.train_dataloader.dataset)
            dataset.full_init()
        except OSError:
            return ASSUMED_OBJECTS, 'assumed: the training set is not here'
    most = 1
    for _, each in iter_datasets(dataset, ''):
        for index in range(len(each)):
            found = each.get_data_info(index).get('instances') or ()
            most = max(most, len(found))
    text = repr(config.train_dataloader.dataset)
    for name, images in MIXES.items():
        if f"{name}'" in text:
            return most * images, f'{images} times the most, for {name}'
    return most, 'the most of the training set'


def set_batch(config: Config, batch: Batch) -> None:
    """Let a config train with a batch, and count its iterations anew.

    Args:
        config (Config): Changed: the batch, ``accumulative_counts``, what
            counts iterations (loop, schedulers and hooks), and the batch that
            ``auto_scale_lr`` compares with, which knows of no accumulation.
        batch (Batch): Of a :class:`BatchSearch` of the config.
    """
    before = batch_size(config)
    config.train_dataloader.batch_size = batch.images
    config.optim_wrapper.accumulative_counts = batch.counts

    def scale(owner: dict, *keys: str) -> None:
        for key in keys:
            value = owner.get(key)
            if isinstance(value, (list, tuple)):
                owner[key] = [_scaled(each) for each in value]
            elif value is not None:
                owner[key] = _scaled(value)

    def _scaled(count: float) -> float:
        if not isinstance(count, int) or count < 1:
            return count
        return max(1, round(count * before / batch.images))

    scaling = config.get('auto_scale_lr') or {}
    if 'base_batch_size' in scaling:
        scaling.base_batch_size *= batch.images / before
    for _, scheduler in schedulers_of(config.get('param_scheduler')):
        if not scheduler.get('by_epoch', True):
            scale(scheduler, *COUNTS)
    loop = config.get('train_cfg') or {}
    if loop.get('by_epoch') is False or 'max_iters' in loop:
        scale(loop, 'max_iters', 'val_interval', 'val_begin')
        hooks = (config.get('default_hooks') or {}).values()
        for hook in (*hooks, *(config.get('custom_hooks') or ())):
            if hook and hook.get('by_epoch') is False:
                scale(hook, 'interval')
