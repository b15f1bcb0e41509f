"""Where a trunk's weights came from, and how they are stored."""

from mmengine.dist import is_main_process
from torch import nn

from e3va_mm.numerics.stored_weights import coarse_keys, store, unstore
from e3va_mm.trunks import Trunk
from e3va_mm.weights import SourceWeights


class TrunkStorage:
    """Stores a trunk as its options ask for; keeps its weights as they came.

    Backbones that share a trunk share this too.

    Attributes:
        source (str, optional): Where the weights came from; None while they
            are random.
        address (str, optional): Path or URL that the same weights can be read
            from again.
        stored (bool): Whether they are stored as asked for now.
        source_weights (SourceWeights, optional): The weights as they came, by
            their names in the backbone, where they are stored coarser.
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self.address: str | None = None
        self.stored = False
        self.source_weights: SourceWeights | None = None

    def store(self, trunk: Trunk, holder: nn.Module) -> None:
        """Store the trunk's linear layers, if they are not yet.

        Not before the first forward pass: until then frameworks initialise,
        wrap and load, and take offence at parameters that change their kind.

        Args:
            trunk (Trunk): What knows its options.
            holder (nn.Module): The backbone with the stock modules.
        """
        if self.stored:
            return
        kind, body = trunk.options.weights, trunk.body(holder)
        coarse = {
            f'{name}.{key}': part.get_parameter(key)
            for name, part in body
            for key in coarse_keys(part, kind)
        }
        # Only the main process writes checkpoints; 8 bits need the source to
        # be loaded beside, too.
        if coarse and (is_main_process() or kind == 'int8'):
            self.source_weights = SourceWeights(coarse)
        for _, part in body:
            store(part, kind)
        self.stored = True

    def unstore(self, trunk: Trunk, holder: nn.Module) -> None:
        """Make room for new weights as they come."""
        if self.stored:
            for _, part in trunk.body(holder):
                unstore(part, trunk.options.weights)
            self.source_weights = None
            self.stored = False
