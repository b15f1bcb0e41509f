"""Which graphics cards hold a training step, and what to change for others."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS

from e3va_mm.errors import ConfigError

MIB = 2**20
GIB = 2**30
# What accounting by storage cannot see. Estimates, on the safe side.
# The driver's context with torch's kernels: about 0.3 GiB since CUDA 11.7
# loads kernels lazily, https://github.com/pytorch/pytorch/issues/107667
CONTEXT = GIB // 2
# cuBLAS takes 4 to 32 MiB a handle and stream, cuDNN what the algorithm of a
# convolution asks for; both come and go within an operator.
WORKSPACES = GIB // 4
# The caching allocator rounds sizes up and leaves gaps: share of the peak.
FRAGMENTATION = 0.1
# Bytes of a gradient.
FLOAT = 4
# Modules named in one suggestion.
NAMED = 4
# Not to be recomputed: the model itself, the batch, a container of heads.
NOT_RECOMPUTED = ('', 'data_preprocessor', 'roi_head')
# What these keep are their outputs, which the heads keep as inputs.
OUTPUTS_ARE_KEPT = 'roi_extractor'
# The framework's heads that normalise 1x1 maps need two pictures a batch.
SMALLEST_BATCH = {'mmseg': 2}


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


class Verdict(NamedTuple):
    """Whether a card holds a step.

    Attributes:
        size (float): Memory of the card in GiB, its name plate's GB.
        needed (int): Bytes that the step needs, margin included.
        holds (bool): Whether that is at most ``size``.
        changes (tuple[Change, ...]): What to change where it is not, those
            that work on the most bytes first.
    """

    size: float
    needed: int
    holds: bool
    changes: tuple[Change, ...] = ()


def fits(
    memory: Mapping,
    sizes_gb: Iterable[float],
    config: Config | None = None,
    parameters: Mapping | None = None,
) -> list[Verdict]:
    """Say which cards hold a step, and what to change for the others.

    Args:
        memory (Mapping): Of :meth:`~e3va_mm.measure.TrainingStep.memory`.
        sizes_gb (Iterable[float]): Memory of the cards in GiB. An "11 GB"
            card has 11 GiB.
        config (Config, optional): The config that was measured, for changes
            that depend on it. Defaults to none: none are proposed.
        parameters (Mapping, optional): Of
            :meth:`~e3va_mm.measure.TrainingStep.parameters`; sizes what
            concerns weights and gradients. Defaults to none known.

    Returns:
        list[Verdict]: One for each size, in their order.

    Raises:
        ConfigError: If a size is not above zero.
    """
    parameters = dict(parameters or {})
    at_once = 0 if _one_by_one(config) else parameters.get('trainable', 0)
    needed = needed_bytes(memory, at_once)
    verdicts = []
    for size in sizes_gb:
        if not size > 0:
            raise ConfigError(
                f'Expected sizes of cards in GB above zero, but got {size}.'
            )
        holds = needed <= size * GIB
        changes = []
        if config and not holds:
            changes = _changes(memory, config, parameters, at_once, size)
        changes.sort(key=lambda change: -change.addresses)
        verdicts.append(Verdict(size, needed, holds, tuple(changes)))
    return verdicts


def needed_bytes(memory: Mapping, at_once: int = 0) -> int:
    """Bytes a card needs for a step: the figures and the margin.

    On CUDA torch's optimizers update all weights at once and hold about as
    many bytes of intermediates (``foreach`` in the documentation of
    ``torch.optim``). Measured on CPU, that is added here. Measured on CUDA,
    it is among the allocated bytes, as workspaces are, and how much
    fragmentation adds at most is known: what was reserved.

    Args:
        memory (Mapping): Of :meth:`~e3va_mm.measure.TrainingStep.memory`.
        at_once (int): Values that are updated at once: all that train, or 0
            with ``foreach=False``. Defaults to 0.

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
    return round(peak) + CONTEXT


def _update_bytes(memory: Mapping, at_once: int) -> int:
    """What is alive in the update: gradients and their like twice."""
    return memory['weights'] + memory['optimizer'] + 2 * FLOAT * at_once


def _one_by_one(config: Config | None) -> bool:
    """Whether the optimizer is told to update one weight after the other."""
    wrapper = config.optim_wrapper if config else {}
    return (wrapper.get('optimizer') or {}).get('foreach') is False


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


def kept_by_part(kept_modules: Mapping[str, int]) -> dict[str, int]:
    """Sum the bytes kept by module to parts that a config names.

    Args:
        kept_modules (Mapping[str, int]): Module path to bytes.

    Returns:
        dict[str, int]: ``backbone``, ``neck``, ``roi_head.bbox_head.0``... to
        bytes, the largest first.
    """
    parts: dict[str, int] = {}
    for path, size in kept_modules.items():
        part = _part(path)
        parts[part] = parts.get(part, 0) + size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _part(path: str) -> str:
    """The start of a path that names one callable module of a config."""
    names = path.split('.')
    length = 2 if names[0] == 'roi_head' else 1
    if len(names) > length and names[length].isdigit():
        length += 1
    return '.'.join(names[:length])


def _changes(
    memory: Mapping,
    config: Config,
    parameters: Mapping,
    at_once: int,
    size: float,
) -> list[Change]:
    """What can be changed for a card."""
    parts = kept_by_part(memory['kept_modules'])
    kept_backbone = parts.pop('backbone', 0)
    # The peak is in the update: activations are gone by then.
    gone = memory['kept'] < 0.05 * sum(memory['kept_modules'].values())
    on_top = (
        'allocated' not in memory
        and _update_bytes(memory, at_once) > memory['peak']
    )
    found = []
    if at_once and (gone or on_top):
        found.append(_single_updates(memory, at_once))
        if on_top and needed_bytes(memory) <= size * GIB:
            return found
    found += _backbone_changes(
        memory, config, parameters, 0 if gone else kept_backbone
    )
    if not gone:
        # Beside updates one by one, if these are among the changes.
        at_once = 0 if on_top else at_once
        trainable = parameters.get('trainable', 0)
        found += _checkpointing(config, parts)
        found += _mixed_precision(config, memory)
        found += _smaller_batch(memory, config, trainable, at_once, size)
    return [change for change in found if change.addresses > 0]


def _single_updates(memory: Mapping, at_once: int) -> Change:
    return Change(
        max(FLOAT * at_once, memory['temporaries']),
        'intermediates of the update of all weights at once: update one '
        'after the other, a little slower',
        'optim_wrapper = dict(optimizer=dict(foreach=False))',
    )


def _backbone_changes(
    memory: Mapping, config: Config, parameters: Mapping, kept: int
) -> Iterable[Change]:
    backbone = config.model.get('backbone') or {}
    name = _class_name(backbone)
    trains = parameters.get('trainable_backbone', 0)
    if not name.startswith('E3VA'):
        ours = f'e3va_mm.E3VA{name}'
        if name and trains and MODELS.get(ours):
            share = trains / parameters['trainable']
            yield Change(
                round(kept + FLOAT * trains + memory['optimizer'] * share),
                'kept by the backbone, its gradients and optimizer state: '
                'freeze it and train a side path',
                f"model = dict(backbone=dict(type='{ours}'))",
            )
        return
    side_path = backbone.get('side_path') or {}
    if side_path.get('preset') == 'lean':
        return
    yield Change(
        kept,
        'kept by the side path: the preset lean keeps taps in 4 bits (and '
        'has the trunk in 16)',
        "model = dict(backbone=dict(side_path=dict(preset='lean')))",
    )
    if side_path.get('trunk_weights') is None:
        frozen = parameters.get('backbone', 0) - trains
        yield Change(
            FLOAT * frozen,
            'weights of the frozen trunk: store them in 16 bits',
            'model = dict(backbone=dict(side_path=dict('
            "trunk_weights='bf16')))",
        )


def _class_name(config: Mapping) -> str:
    """Name of the class of a module; new-style configs hold the class."""
    kind = config.get('type', '')
    return kind.__name__ if isinstance(kind, type) else kind.split('.')[-1]


def _checkpointing(
    config: Config, parts: Mapping[str, int]
) -> Iterable[Change]:
    hook = 'ActivationCheckpointHook'
    hooks = config.get('custom_hooks') or []
    chosen = [
        part
        for part in parts
        if part not in NOT_RECOMPUTED and not part.endswith(OUTPUTS_ARE_KEPT)
    ][:NAMED]
    if not chosen or any(_class_name(entry) == hook for entry in hooks):
        return
    paths = [_callable_path(config, part) for part in chosen]
    others = '*_base_.custom_hooks, ' if hooks else ''
    yield Change(
        sum(parts[part] for part in chosen),
        f'kept by {", ".join(chosen)}: compute them again in backward',
        f"custom_hooks = [{others}dict(type='e3va_mm.{hook}', "
        f'modules={paths})]',
    )


def _callable_path(config: Config, part: str) -> str:
    """A part, or what is in it if it is a list of modules."""
    first, *rest = part.split('.')
    node = config.model.get(first) or {}
    # Cascades make a list of one head's config, one for each stage.
    several = len(rest) == 1 and 'num_stages' in node
    if not rest:
        several = isinstance(node, list | tuple)
    return f'{part}.*' if several else part


def _mixed_precision(config: Config, memory: Mapping) -> Iterable[Change]:
    if not is_amp(config):
        yield Change(
            memory['kept'] + memory['temporaries'],
            'activations: mixed precision has most of them in 16 bits',
            "optim_wrapper = dict(type='AmpOptimWrapper')",
        )


def is_amp(config: Config) -> bool:
    """Whether a config trains in mixed precision."""
    return 'Amp' in _class_name(config.optim_wrapper)


def _smaller_batch(
    memory: Mapping, config: Config, trainable: int, at_once: int, size: float
) -> Iterable[Change]:
    """The largest smaller batch that the card holds, the product the same."""
    batch = config.train_dataloader.batch_size
    smallest = SMALLEST_BATCH.get(config.get('default_scope'), 1)
    for smaller in range(batch - 1, smallest - 1, -1):
        share = smaller / batch
        scaled = _of_batch(memory, share, trainable)
        if batch % smaller or needed_bytes(scaled, at_once) > size * GIB:
            continue
        times = batch // smaller
        counts = times * config.optim_wrapper.get('accumulative_counts', 1)
        note = ''
        if 'max_iters' in (config.get('train_cfg') or {}):
            note = f'; multiply max_iters and schedules by {times}'
        yield Change(
            round((memory['kept'] + memory['temporaries']) * (1 - share)),
            f'activations of {batch} pictures: take {smaller} at a time and '
            f'add up the gradients of {times} iterations{note}',
            f'train_dataloader = dict(batch_size={smaller})\n'
            f'optim_wrapper = dict(accumulative_counts={counts})',
        )
        return


def _of_batch(memory: Mapping, share: float, trainable: int) -> dict:
    """The figures of a step with a share of the pictures, accumulating."""
    # Gradients stay from one iteration to the next.
    gradients = max(memory['gradients'], FLOAT * trainable)
    peak = (
        memory['weights']
        + memory['optimizer']
        + gradients
        + share * (memory['kept'] + memory['temporaries'])
    )
    scaled = {
        key: memory[key] * peak / memory['peak']
        for key in ('peak', 'allocated', 'reserved')
        if key in memory
    }
    return {**memory, **scaled}
