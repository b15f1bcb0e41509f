"""Checks of loops, samplers, schedulers and batches."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from e3va_mm.errors import ConfigError
from e3va_mm.preflight.problems import Problems, option_problem, warning
from e3va_mm.preflight.reading import Datasets
from e3va_mm.utils.configs import class_name

EPOCHS, ITERATIONS = 'EpochBasedTrainLoop', 'IterBasedTrainLoop'
# Their batches never end.
ENDLESS = ('InfiniteSampler', 'MultiSourceSampler', 'GroupMultiSourceSampler')
BATCH_NORM = 'Expected more than 1 value per channel when training'


def check_loop(config: Config, datasets: Datasets) -> Problems:
    """Find samplers, schedulers and checkpoints that do not fit the loop."""
    loop, loader = config.get('train_cfg'), config.get('train_dataloader')
    if not loop or not loader:
        return
    kind = class_name(loop) or (EPOCHS if loop.get('by_epoch') else ITERATIONS)
    sampler = class_name(loader.get('sampler') or {})
    if kind == EPOCHS and sampler in ENDLESS:
        yield option_problem(
            'train_dataloader.sampler',
            f'{sampler}, whose epoch never ends, in an {kind}',
            'DefaultSampler',
            "Set train_dataloader.sampler=dict(type='DefaultSampler', "
            f"shuffle=True), or train_cfg=dict(type='{ITERATIONS}', "
            'max_iters=...).',
        )
    if kind != ITERATIONS:
        return
    for option, each in schedulers_of(config.get('param_scheduler')):
        kind_of_step = class_name(each)
        # Those that read a metric step where it is given, after validation.
        if (
            each.get('by_epoch', True)
            and not each.get('convert_to_iter_based')
            and not kind_of_step.startswith('ReduceOnPlateau')
        ):
            yield option_problem(
                f'{option}.by_epoch',
                f'True: {kind_of_step} would never step in an {kind}',
                'False',
                f'Set {option}.by_epoch=False and count in iterations.',
            )
    saving = (config.get('default_hooks') or {}).get('checkpoint') or {}
    if saving.get('by_epoch', True) and saving.get('interval', 1) > 0:
        yield warning(
            'default_hooks.checkpoint.by_epoch',
            f'True: in an {kind} a checkpoint is written at the end alone',
            'False',
            'Set default_hooks.checkpoint=dict(by_epoch=False, interval=...).',
        )


def check_batch_norm(
    config: Config, datasets: Datasets, model: nn.Module
) -> Problems:
    """Find batch norms over one value: a batch of one, pooled to one pixel."""
    loader = config.get('train_dataloader') or {}
    samples = [d.samples for d in datasets.values() if d.loader[:5] == 'train']
    size = loader.get('batch_size')
    if not samples or not size or loader.get('batch_sampler'):
        return
    was_training = model.training
    model.train()  # which keeps frozen norms in eval mode
    pooled = dict(_pooled_norms(model))
    model.train(was_training)
    world = get_world_size()
    for name, norm in pooled.items():
        ranks = world if isinstance(norm, SyncBatchNorm) else 1
        last = math.ceil(samples[0] / world) % size
        sampler = class_name(loader.get('sampler') or {})
        if size * ranks == 1:
            where, found = 'batch_size', '1'
            expected = '2 or more'
            advice = 'Set train_dataloader.batch_size=2.'
        elif (
            last * ranks == 1
            and sampler not in ENDLESS
            and not loader.get('drop_last')
        ):
            where = 'drop_last'
            found = f'False: the last of {samples[0]} samples is alone'
            expected = 'True'
            advice = 'Set train_dataloader.drop_last=True.'
        else:
            continue
        yield option_problem(
            f'train_dataloader.{where}',
            found,
            f'{expected}, as the batch norm {name} sees one value an image',
            advice,
        )
        return


def explain_batch_norm(cause: BaseException) -> None:
    """Raise ConfigError for torch's error about a batch norm of one value."""
    if BATCH_NORM in str(cause):
        raise ConfigError(
            f'train_dataloader.batch_size: a batch norm saw one value '
            f'({cause}); expected two images or more in each batch.\nSet '
            'train_dataloader.batch_size=2 or more, and drop_last=True if '
            'the last batch is smaller.'
        ) from cause


def _pooled_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Batch norms in training mode that follow a pooling to one pixel."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        pooled = False
        for key, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                pooled = child.output_size in (1, (1, 1))
            elif pooled:
                for inner, norm in child.named_modules():
                    if isinstance(norm, _BatchNorm) and norm.training:
                        yield '.'.join(filter(None, (name, key, inner))), norm


def schedulers_of(found: Any) -> Iterator[tuple[str, Mapping]]:
    """Options and configs of the schedulers, of one optimizer or more."""
    option = 'param_scheduler'
    several = isinstance(found, Mapping) and 'type' not in found
    groups = found.items() if several else [('', found)]
    for name, group in groups:
        inner = f'{option}.{name}' if name else option
        if isinstance(group, Mapping):
            yield inner, group
            continue
        for i, each in enumerate(group or ()):
            if isinstance(each, Mapping):
                yield f'{inner}.{i}', each
