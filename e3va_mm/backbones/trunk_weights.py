"""Where a trunk's weights came from, and how they are stored."""

from collections.abc import Mapping

from mmengine.dist import is_main_process
from torch import Tensor

from e3va_mm.numerics.stored_weights import coarse_keys, make_room, store
from e3va_mm.trunks import Trunk
from e3va_mm.weights import SourceWeights


class TrunkWeights:
    """Stores a trunk as its options ask for; keeps its weights as they came.

    Backbones that share a trunk share this too.

    Attributes:
        source (str, optional): Where the weights came from; None while they
            are random.
        address (str, optional): Path or URL that the same weights can be read
            from again.
        norms (dict[str, Tensor], optional): The output norms of the stock
            backbone, by name; None if the weights came without them.
        fingerprint (str, optional): Of the weights as they came, where they
            are not kept.
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self.address: str | None = None
        self.norms: dict[str, Tensor] | None = None
        self.fingerprint: str | None = None
        self._as_loaded: SourceWeights | None = None

    def as_loaded(
        self, trunk: Trunk, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights as they came, of those that are stored coarser.

        Processes that write no checkpoint do not keep them: there the stored
        values stand in, in the type that the others give.

        Args:
            trunk (Trunk): The trunk.
            state (Mapping[str, Tensor]): The state dict as it is stored.
        """
        if self.source is None:
            return {}
        if self._as_loaded is not None:
            return dict(self._as_loaded)
        return {key: state[key].float() for key in self.coarse(trunk)}

    def take(self, trunk: Trunk, state: Mapping[str, Tensor]) -> bool:
        """Keep what is about to be loaded, and make room for it.

        Args:
            trunk (Trunk): The trunk.
            state (Mapping[str, Tensor]): The whole state of its backbone.

        Returns:
            bool: Whether the weights can be had again as they came.
        """
        kind = trunk.options.weights
        coarse = {key: state[key].float() for key in self.coarse(trunk)}
        self._as_loaded = self.fingerprint = None
        # Only the main process writes checkpoints; from 8 bits a state cannot
        # be loaded again, so that each process needs its source.
        if coarse and (is_main_process() or kind == 'int8'):
            self._as_loaded = SourceWeights(coarse)
        self.make_room(trunk)
        return not coarse or self._as_loaded is not None

    def make_room(self, trunk: Trunk) -> None:
        """Let a state be loaded into what is stored in 8 bits."""
        if trunk.options.weights == 'int8':
            for _, part in trunk.stored_parts():
                make_room(part)

    def store(self, trunk: Trunk) -> None:
        """Store the linear layers as the options of the trunk say."""
        for _, part in trunk.stored_parts():
            store(part, trunk.options.weights)

    def coarse(self, trunk: Trunk) -> list[str]:
        """Names of the weights that are stored coarser than they come."""
        return [
            f'{path}.{key}'
            for path, part in trunk.stored_parts()
            for key in coarse_keys(part, trunk.options.weights)
        ]
