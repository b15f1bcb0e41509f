"""Numbers of parameters."""

from torch import nn


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of values in all and in the trainable parameters.

    Args:
        module (nn.Module): Any module. A shared parameter counts once.

    Returns:
        tuple[int, int]: All values, trainable values.
    """
    total = trainable = 0
    for parameter in module.parameters():
        total += parameter.numel()
        trainable += parameter.numel() * parameter.requires_grad
    return total, trainable
