"""A pass of a tuned backbone as if nothing of it had been tuned."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.swapping import swapped

HOOKS = ('_forward_pre_hooks', '_forward_hooks')


def run_stock(backbone: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """What the stock backbone gives, bit for bit, without a graph.

    Args:
        backbone (TunedBackbone): Its tuner is switched off.
        image (Tensor): (B, 3, H, W).

    Raises:
        ConfigError: If the tuner has changed stock weights themselves, or
            the output norms that came with the trunk are not known.
    """
    values = _stock_values(backbone)
    stock_class = backbone.trunk.stock_class
    with (
        torch.no_grad(),
        swapped(backbone, values),
        _nothing_inserted(backbone),
        _trainable(backbone),
    ):
        outputs = stock_class.forward(backbone, image)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _stock_values(backbone: nn.Module) -> dict[str, Tensor]:
    """What the stock backbone has where this one has something else."""
    if backbone.has_graph:
        changed = backbone.trained_stock()
        if changed:
            raise ConfigError(
                f'{type(backbone.tuner).__name__} changes weights of the '
                f'stock backbone itself, {len(changed)} of them, and cannot '
                'be switched off. `tuned=False` of the MultiTaskInferencer '
                'takes them from `load_from` of the config.'
            )
        return {}
    storage, trunk = backbone.storage, backbone.trunk
    own = backbone.state_dict()
    norms = backbone.norm_names()
    missing = [name for name in norms if name not in (storage.norms or {})]
    if missing:
        raise ConfigError(
            f'The output norms of the stock backbone ({", ".join(missing)}) '
            'are not known: a checkpoint has brought the trunk together with '
            'trained norms. Load the checkpoint that the training began with '
            '(`load_from`, `init_cfg`) before this one, or use the adapter '
            'file, which names it.'
        )
    values = {name: storage.norms[name] for name in norms}
    # The state dict holds weights as they came, however they are stored.
    values |= {name: own[name].float() for name in storage.coarse(trunk)}
    return {
        name: nn.Parameter(value.to(own[name].device))
        for name, value in values.items()
    }


@contextmanager
def _nothing_inserted(backbone: nn.Module) -> Iterator[None]:
    """The stock modules without our kernels and without a tuner's hooks."""
    inside = {*backbone.tuner.modules()}
    before = []
    for module in backbone.modules():
        if module in inside:
            continue
        held = vars(module)
        changed = {name: held[name] for name in HOOKS if held[name]}
        for name, hooks in changed.items():
            others = {k: v for k, v in hooks.items() if not _ours(v)}
            held[name] = OrderedDict(others)
        if _ours(held.get('forward')):
            changed['forward'] = held.pop('forward')
        before.append((held, changed))
    try:
        yield
    finally:
        for held, changed in before:
            held.update(changed)


@contextmanager
def _trainable(backbone: nn.Module) -> Iterator[None]:
    """Weights that require gradients, as those of a stock backbone do.

    torch sums products of others in another order, even without a graph.
    """
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad = True
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def _ours(function: object) -> bool:
    return (getattr(function, '__module__', None) or '').startswith('e3va_mm.')
