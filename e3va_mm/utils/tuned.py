"""Tuned backbones as other rooms see them, and how they are found."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class TunedModule:
    """The base of backbones of which a declared part trains.

    Attributes:
        trunk_source (str, optional): Where the trunk's weights came from; None
            while they are random.
        trunk_address (str, optional): Path or URL that the trunk's weights can
            be read from again.
        has_graph (bool): Whether gradients travel through the stock blocks.
    """

    trunk_source: str | None
    trunk_address: str | None
    has_graph: bool

    def trunk_state(self) -> dict[str, Tensor]:
        """The trunk's part of the state dict, its weights as they came."""
        raise NotImplementedError

    def trunk_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a state with the backbone's names is the frozen trunk's."""
        raise NotImplementedError

    def upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        """Bring a state of earlier versions, changed, into today's form.

        Defaults to nothing.
        """

    def declared(self) -> Iterator[nn.Parameter]:
        """What the tuner adds, and must receive gradients."""
        raise NotImplementedError

    def trainable_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Paths and modules of what trains beside a trunk without a graph."""
        raise NotImplementedError


def tuned_backbones(
    model: nn.Module,
) -> Iterator[tuple[str, TunedModule]]:
    """Prefixes (``'backbone.'``) and modules of the tuned backbones."""
    for name, module in model.named_modules():
        if isinstance(module, TunedModule):
            yield f'{name}.' if name else '', module


def side_path_backbones(
    model: nn.Module,
) -> Iterator[tuple[str, TunedModule]]:
    """The same of those whose trunk runs without a graph."""
    for prefix, module in tuned_backbones(model):
        if not module.has_graph:
            yield prefix, module
