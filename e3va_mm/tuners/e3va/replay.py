"""Taps that were not kept, brought again by the frozen trunk."""

from collections.abc import Callable, Collection

from torch import Tensor

# (stage, tap of shape (B, L, C)), in the order of the forward pass.
OnStageTap = Callable[[int, Tensor], None]
# (image, last stage, stages whose taps are wanted, taker of taps)
RunTrunk = Callable[[Tensor, int, Collection[int], OnStageTap], None]


class Replay:
    """Runs a trunk once more in backward, for all stages that want it.

    Only the image is needed, which a training step holds on to anyway.

    Args:
        image (Tensor): (B, 3, H, W), what the trunk ran on. Whoever wants
            taps keeps it for backward; it is not kept here.
        run (Callable): Runs the trunk without a graph, see ``RunTrunk``.
    """

    def __init__(self, image: Tensor, run: RunTrunk) -> None:
        self.image: Tensor | None = image
        self._run = run
        self._wanted: set[int] = set()
        self._taps: dict[int, list[Tensor]] = {}

    def want(self, stage: int) -> None:
        """Say that the taps of a stage will be asked for."""
        self._wanted.add(stage)

    def take(self, stage: int, image: Tensor) -> list[Tensor]:
        """The taps (B, L, C) of a stage, in the order of the forward pass.

        Backward begins at the last stage: whoever comes first runs the trunk
        up to its own, and those before find theirs.
        """
        if stage not in self._taps:
            wanted = {other for other in self._wanted if other <= stage}
            taps = {other: [] for other in wanted}
            self._run(
                image, stage, wanted, lambda of, tap: taps[of].append(tap)
            )
            self._taps = taps
        return self._taps.pop(stage)
