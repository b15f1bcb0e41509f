"""Activation checkpointing of chosen modules, with every gradient kept.

Wraps ``torch.utils.checkpoint`` in its non-reentrant form. mmengine's own
``activation_checkpointing`` uses the reentrant one, which finds no tensor
inside a tuple and no gradient to follow into one: a neck loses its graph.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from e3va_mm.errors import ConfigError
from e3va_mm.utils.module_paths import check_patterns, matching


def checkpoint_modules(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Let modules keep their inputs alone and recompute the rest.

    Losses, gradients, batch norm statistics and dropout are those of the
    module left as it was; state dicts do not change, copies of the model are
    checkpointed too. Where no gradient is recorded the module runs as always.
    Forward hooks of the parts of a chosen module run in both passes;
    ``torch.compile`` leaves the module out.

    Args:
        model (nn.Module): The model, without its wrapper.
        paths (Sequence[str]): Modules as in ``model.named_modules()``:
            ``neck``, ``roi_head.mask_head.0``. ``*`` stands for any one part:
            ``roi_head.bbox_head.*``.

    Returns:
        list[str]: Paths of all the modules chosen, each once, also of those
        that had been chosen before.

    Raises:
        ConfigError: If a path matches nothing or a module whose forward cannot
            be wrapped, or if a module lies inside another that is chosen, now
            or before.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> checkpoint_modules(model, ['*'])
        ['0', '1']
    """
    check_patterns(paths, 'Modules to checkpoint')
    named = dict(model.named_modules(remove_duplicate=False))
    del named['']
    kind = type(model).__name__
    chosen: dict[nn.Module, str] = {}
    for path in paths:
        for name in matching(path, named, f'module of {kind}'):
            chosen.setdefault(named[name], name)
    earlier = {m: name for name, m in named.items() if is_checkpointed(m)}
    _check({**earlier, **chosen})
    # Compilers do not know the contexts that this needs.
    forward = torch.compiler.disable(_forward)
    for module in chosen.keys() - earlier.keys():
        # A bound method: `copy.deepcopy` binds it to the copy.
        module.forward = MethodType(forward, module)
        module.checkpoint_has_run = False
    return list(chosen.values())


def is_checkpointed(module: nn.Module) -> bool:
    """Whether :func:`checkpoint_modules` has wrapped the module."""
    return 'checkpoint_has_run' in vars(module)


def _check(chosen: dict[nn.Module, str]) -> None:
    """Refuse modules never called, wrapped otherwise, or inside another."""
    for module, name in chosen.items():
        kind = type(module).__name__
        if type(module).forward is nn.Module.forward:
            raise ConfigError(
                f'{name} is a {kind}, which is never called itself. Choose '
                f"its parts: '{name}.*'."
            )
        if 'forward' in vars(module) and not is_checkpointed(module):
            raise ConfigError(
                f'The forward of {name} ({kind}) is wrapped already, by '
                "something else. mmengine's `activation_checkpointing` in the "
                'config does that; remove it.'
            )
        for part in module.modules():
            if part is not module and part in chosen:
                raise ConfigError(
                    f'{chosen[part]} lies inside {name}, and both are to be '
                    'checkpointed: it would be computed three times. Choose '
                    'one of them.'
                )


def _forward(self: nn.Module, *args, **kwargs):
    """Stands in for ``forward`` of a checkpointed module."""
    forward = type(self).forward
    if not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    self.checkpoint_has_run = True
    # As a function of tensors alone: inside tuples torch would not notice
    # that they were changed in place before the recomputation.
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
    tensors = [leaves[i] for i in places]
    others = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]

    def run(*tensors: Tensor):
        values = list(others)
        for i, tensor in zip(places, tensors, strict=True):
            values[i] = tensor
        args, kwargs = tree_unflatten(values, spec)
        return forward(self, *args, **kwargs)

    return checkpoint(
        run,
        *tensors,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=lambda: (nullcontext(), _SameBuffers(self)),
    )


class _SameBuffers:
    """Recompute from the buffers of the first pass, and leave no trace.

    Batch norms update their running statistics in both passes otherwise.
    Entered once for each backward pass through the graph.

    Args:
        module (nn.Module): The module, just before its first pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self._first = [
            (owner._buffers, name, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        self._now = [buffers[name] for buffers, name, _ in self._first]
        for buffers, name, value in self._first:
            buffers[name] = value.clone()

    def __exit__(self, *exception) -> None:
        for (buffers, name, _), value in zip(
            self._first, self._now, strict=True
        ):
            buffers[name] = value
        del self._now
