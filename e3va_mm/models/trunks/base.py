"""What a backbone with a side path asks of a trunk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .options import TrunkOptions

# Called with (block index, tap name, tap of shape (B, L, C)).
OnTap = Callable[[int, str, Tensor], None]
Size = tuple[int, int]


class StageSpec(NamedTuple):
    """A stage as a side path sees it: channels, blocks, taps of a block."""

    channels: int
    depth: int
    taps: tuple[str, ...]


class StageOutput(NamedTuple):
    """What running a stage gives: its end and the start of the next."""

    tokens: Tensor  # (B, L, C)
    size: Size  # (H, W), H * W = L
    next_tokens: Tensor | None  # (B, L', C'), None after the last stage
    next_size: Size | None


class Band(NamedTuple):
    """Rows of a grid that are downsampled without the others."""

    tokens: slice  # of the L before
    patches: slice  # of the L' after
    gather: Callable[..., Tensor]  # as that of the whole


class Downsampling(NamedTuple):
    """A frozen downsampling in two steps: gather and norm, then a product.

    Differences must be taken between the steps, before the product rounds to
    the type of the weight.
    """

    # (B, L, C) -> (B, L', G); `norm=False` leaves the norm out.
    gather: Callable[..., Tensor]
    weight: Callable[[], Tensor]  # () -> (C', G), in the compute type
    # Size of the batch -> some tokens at a time, in order; None for all.
    bands: Callable[[int], Iterable[Band]] | None = None


class Trunk(ABC):
    """Reads one family of stock backbones; knows no side path.

    It owns no module: the stock modules are children of ``holder``, the
    backbone that has adopted them under their stock names.

    Attributes:
        options (TrunkOptions): How the frozen modules compute.
    """

    options: TrunkOptions

    @abstractmethod
    def prepare(self, holder: nn.Module) -> None:
        """Let the adopted modules compute as the options say."""

    @abstractmethod
    def body(self, holder: nn.Module) -> tuple[str, nn.Module]:
        """Name and module of the part whose linear layers count."""

    @abstractmethod
    def stages(self, holder: nn.Module) -> Sequence[StageSpec]:
        """The stages that lead to the last output."""

    @abstractmethod
    def embed(self, holder: nn.Module, image: Tensor) -> tuple[Tensor, Size]:
        """(B, 3, H, W) -> tokens (B, L, C) and their grid."""

    @abstractmethod
    def run_stage(
        self,
        holder: nn.Module,
        stage: int,
        tokens: Tensor,
        size: Size,
        taps: Sequence[str],
        on_tap: OnTap,
    ) -> StageOutput:
        """Run a stage and hand out each tap as soon as it is there."""

    @abstractmethod
    def downsampling(
        self, holder: nn.Module, stage: int, size: Size
    ) -> Downsampling:
        """The downsampling after a stage whose grid is ``size``."""

    @abstractmethod
    def init_random(self, holder: nn.Module) -> None:
        """Draw the weights as the stock class does without a checkpoint."""

    @abstractmethod
    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """State with stock names from any known format, and its name."""

    @abstractmethod
    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Fit tensors in place where stock loading does; say what was done."""

    @abstractmethod
    def leftovers(self, holder: nn.Module) -> list[str]:
        """Regular expressions of keys that a fitting file may have too."""

    @abstractmethod
    def explain_mismatch(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> str:
        """The likely cause when a file does not fit."""
