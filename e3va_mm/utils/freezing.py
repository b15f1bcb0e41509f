"""Freezing: what of a backbone trains is applied here, and nowhere else.

Necks and heads are frozen by ``FreezeHook``, where a config asks for it.
"""

from collections.abc import Iterable

from torch import nn


def mark_trainable(
    module: nn.Module, trainable: Iterable[nn.Module | nn.Parameter]
) -> None:
    """Let exactly the parameters of ``trainable`` train; freeze the rest.

    Args:
        module (nn.Module): The module whose parameters are all set.
        trainable (Iterable[nn.Module | nn.Parameter]): The descendants and
            parameters that train.
    """
    for parameter in module.parameters():
        parameter.requires_grad = False
    for part in trainable:
        single = isinstance(part, nn.Parameter)
        for parameter in [part] if single else part.parameters():
            parameter.requires_grad = True
