"""Models inside of wrappers, such as DDP's."""

from mmengine.model import is_model_wrapper
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers; one without is given back."""
    while is_model_wrapper(model):
        model = model.module
    return model
