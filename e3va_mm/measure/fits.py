"""What a training step needs on a graphics card, and how to need less."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS

from e3va_mm.measure.kept import kept_by_part
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.sizes import GIB

# What accounting by storage cannot see. Estimates, on the safe side.
# The driver's context with torch's kernels: about 0.3 GiB since CUDA 11.7
# loads kernels lazily, https://github.com/pytorch/pytorch/issues/107667
CONTEXT = GIB // 2
# cuBLAS takes 4 to 32 MiB per handle and stream, cuDNN what the algorithm of a
# convolution asks for; both come and go within an operator.
WORKSPACES = GIB // 4
# The caching allocator rounds sizes up and leaves gaps: share of the peak.
FRAGMENTATION = 0.1
FLOAT = 4  # bytes of a gradient
NAMED = 4  # modules named in one suggestion
# The model itself, the batch, a container of heads: not to be recomputed. Nor
# are extractors of regions: the heads keep their outputs as inputs.
NOT_RECOMPUTED = ('', 'data_preprocessor', 'roi_head')
OUTPUTS_ARE_KEPT = 'roi_extractor'
# The framework's heads that normalise 1x1 maps need two images in a batch.
SMALLEST_BATCH = {'mmseg': 2}
RECOMPUTE = 'ActivationCheckpointHook'


class Change(NamedTuple):
    """A change of a config that lowers the memory of its step.

    Attributes:
        addresses (int): Bytes that the change works on; it saves a part.
        reason (str): What takes these bytes and what the change does.
        lines (str): Lines for a config whose ``_base_`` is the measured one.
    """

    addresses: int
    reason: str
    lines: str


def needed_bytes(memory: Mapping, at_once: int = 0, averaged: int = 0) -> int:
    """Bytes a card needs for a step: the figures and the margin.

    On CUDA torch's optimizers update all weights at once and hold about as
    many bytes of intermediates (``foreach`` in the documentation of
    ``torch.optim``). That is added to figures of a CPU. Figures of CUDA
    contain it, as well as workspaces, and bound fragmentation by what was
    reserved.

    Args:
        memory (Mapping): Of :meth:`~e3va_mm.measure.TrainingStep.memory`.
        at_once (int): See :func:`updated_at_once`. Defaults to 0.
        averaged (int): See :func:`averaged_bytes`. Defaults to 0.

    Returns:
        int: Bytes.
    """
    if 'allocated' in memory:
        peak = min(
            memory['allocated'] * (1 + FRAGMENTATION), memory['reserved']
        )
    else:
        peak = max(memory['peak'], _update_bytes(memory, at_once))
        peak = peak * (1 + FRAGMENTATION) + WORKSPACES
    return round(peak) + CONTEXT + averaged


def _update_bytes(memory: Mapping, at_once: int) -> int:
    """Alive in an update: gradients and intermediates of their size."""
    return memory['weights'] + memory['optimizer'] + 2 * FLOAT * at_once


def margin_text(memory: Mapping) -> str:
    """What :func:`needed_bytes` adds, as one line."""
    context = f'{CONTEXT / GIB:g} GiB for the CUDA context'
    gaps = f'{FRAGMENTATION:.0%} for fragmentation'
    if 'allocated' in memory:
        return f'allocated + {gaps} (at most the reserved) + {context}'
    workspaces = f'{WORKSPACES / GIB:g} GiB for cuBLAS and cuDNN workspaces'
    return (
        'accounted peak (at least that of an update of all weights at once) '
        f'+ {gaps} + {workspaces} + {context}'
    )


def updated_at_once(config: Config, parameters: Mapping) -> int:
    """Values updated at once: all trainable ones, or 0 if one by one."""
    optimizer = config.optim_wrapper.get('optimizer') or {}
    return parameters['trainable'] * (optimizer.get('foreach') is not False)


def averaged_bytes(
    config: Config, memory: Mapping, parameters: Mapping
) -> int:
    """Bytes of the averaged weights that a config's hooks keep.

    Args:
        config (Config): The config.
        memory (Mapping): Of :meth:`~e3va_mm.measure.TrainingStep.memory`.
        parameters (Mapping): Of ``TrainingStep.parameters()``.
    """
    of_hook = dict(
        EMAHook=memory['weights'],
        TrainableEMAHook=FLOAT * parameters['trainable'],
    )
    hooks = config.get('custom_hooks') or []
    return sum(of_hook.get(class_name(hook), 0) for hook in hooks)


def is_amp(config: Config) -> bool:
    """Whether a config trains in mixed precision."""
    return 'Amp' in class_name(config.optim_wrapper)


def changes(
    config: Config, memory: Mapping, parameters: Mapping
) -> list[Change]:
    """What in a measured config could lower the memory of its step.

    Args:
        config (Config): The config.
        memory (Mapping): Of :meth:`~e3va_mm.measure.TrainingStep.memory`.
        parameters (Mapping): Of ``TrainingStep.parameters()``.

    Returns:
        list[Change]: Those that work on the most bytes first.
    """
    found = []
    parts = kept_by_part(memory['kept_modules'])
    activations = memory['kept'] + memory['temporaries']
    # If the peak is in the update, activations are gone by then.
    gone = memory['kept'] < 0.05 * sum(parts.values())
    at_once = updated_at_once(config, parameters)
    if at_once and (
        gone
        or 'allocated' not in memory
        and _update_bytes(memory, at_once) > memory['peak']
    ):
        found.append(
            Change(
                max(FLOAT * at_once, memory['temporaries']),
                'intermediates of the update of all weights at once: update '
                'one after the other, a little slower',
                'optim_wrapper = dict(optimizer=dict(foreach=False))',
            )
        )
    kept = parts.pop('backbone', 0)
    found += _of_backbone(config, memory, parameters, 0 if gone else kept)
    if not gone:
        found += _recomputation(config, parts)
        found += _smaller_batch(config, activations)
        if not is_amp(config):
            found.append(
                Change(
                    activations,
                    'activations: mixed precision has most of them in 16 bits',
                    "optim_wrapper = dict(type='AmpOptimWrapper')",
                )
            )
    found = [change for change in found if change.addresses > 0]
    return sorted(found, key=lambda change: -change.addresses)


def _of_backbone(
    config: Config, memory: Mapping, parameters: Mapping, kept: int
) -> Iterator[Change]:
    backbone = config.model.get('backbone') or {}
    name = class_name(backbone)
    trains = parameters['trainable_backbone']
    if not name.startswith('E3VA'):
        ours = f'e3va_mm.E3VA{name}'
        if name and trains and MODELS.get(ours):
            state = memory['optimizer'] * trains / parameters['trainable']
            yield Change(
                round(kept + FLOAT * trains + state),
                'kept by the backbone, its gradients and optimizer state: '
                'freeze it and train a side path',
                f"model = dict(backbone=dict(type='{ours}'))",
            )
        return
    key = 'tuner' if 'tuner' in backbone else 'side_path'
    tuner = backbone.get(key) or {}
    if tuner.get('preset') == 'lean':
        return
    line = f'model = dict(backbone=dict({key}=dict({{}})))'
    yield Change(
        kept,
        'kept by the side path: the preset lean keeps taps in 4 bits (and '
        'has the trunk in 16)',
        line.format("preset='lean'"),
    )
    if tuner.get('trunk_weights') is None:
        yield Change(
            FLOAT * (parameters['backbone'] - trains),
            'weights of the frozen trunk: store them in 16 bits',
            line.format("trunk_weights='bf16'"),
        )


def _recomputation(
    config: Config, parts: Mapping[str, int]
) -> Iterator[Change]:
    hooks = config.get('custom_hooks') or []
    chosen = [
        part
        for part in parts
        if part not in NOT_RECOMPUTED and not part.endswith(OUTPUTS_ARE_KEPT)
    ][:NAMED]
    if not chosen or any(class_name(hook) == RECOMPUTE for hook in hooks):
        return
    paths = []
    for part in chosen:
        first, *rest = part.split('.')
        node = config.model.get(first) or {}
        # A list of modules, which has no forward; cascades make one of one
        # head's config.
        is_list = isinstance(node, list | tuple)
        if rest:
            is_list = len(rest) == 1 and 'num_stages' in node
        paths.append(f'{part}.*' if is_list else part)
    others = '*_base_.custom_hooks, ' if hooks else ''
    yield Change(
        sum(parts[part] for part in chosen),
        f'kept by {", ".join(chosen)}: compute them again in backward',
        f"custom_hooks = [{others}dict(type='e3va_mm.{RECOMPUTE}', "
        f'modules={paths})]',
    )


def _smaller_batch(config: Config, activations: int) -> Iterator[Change]:
    """Fewer images at a time, as many per update."""
    batch = config.train_dataloader.batch_size
    smallest = SMALLEST_BATCH.get(config.get('default_scope'), 1)
    sizes = [n for n in range(smallest, batch) if batch % n == 0]
    if not sizes:
        return
    times = batch // sizes[-1]
    counts = times * config.optim_wrapper.get('accumulative_counts', 1)
    note = ''
    if 'max_iters' in (config.get('train_cfg') or {}):
        note = f'; multiply max_iters and schedules by {times}'
    yield Change(
        round(activations * (1 - 1 / times)),
        f'activations of {batch} images: take {sizes[-1]} at a time and '
        f'add up the gradients of {times} iterations{note}',
        f'train_dataloader = dict(batch_size={sizes[-1]})\n'
        f'optim_wrapper = dict(accumulative_counts={counts})',
    )
