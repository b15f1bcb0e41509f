"""Backbones of which a declared part trains, found in a model."""

from collections.abc import Iterator

from torch import nn


def tuned_backbones(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Prefixes and modules of the backbones that know what of them trains."""
    for name, module in model.named_modules():
        if hasattr(module, 'trunk_state'):
            yield f'{name}.' if name else '', module


def side_path_backbones(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Prefixes and modules of those whose trunk runs without a graph."""
    for prefix, module in tuned_backbones(model):
        if hasattr(module, 'trainable_children'):
            yield prefix, module
