"""What a backbone with a side path asks of a trunk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from e3va_mm.trunks.options import TrunkOptions

Size = tuple[int, int]


class StageSpec(NamedTuple):
    """A stage as a side path sees it: channels, blocks, taps of a block."""

    channels: int
    depth: int
    taps: tuple[str, ...]


class StageEnd(NamedTuple):
    """The end of a stage."""

    tokens: Tensor  # (B, extra + H * W, C)
    size: Size  # (H, W)


# (stage, block, name of the tap, tap of shape (B, L, C))
OnTap = Callable[[int, int, str, Tensor], None]
# (stage, its end)
OnEnd = Callable[[int, StageEnd], None]


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
    # () -> (C', G), in the compute type; None where `gather` does it all.
    weight: Callable[[], Tensor] | None
    # Size of the batch -> some tokens at a time, in order; None for all.
    bands: Callable[[int], Iterable[Band]] | None = None


# What a stock backbone knows of training and of its own outputs alone.
NO_SETTINGS = (
    'attn_drop_rate',
    'convert_weights',
    'drop_path_rate',
    'drop_rate',
    'final_norm',
    'frozen_stages',
    'norm_eval',
    'out_indices',
    'out_origin',
    'out_type',
    'output_cls_token',
    'pretrained',
    'training',
    'with_cp',
)


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Numbers, texts and tuples that a module computes with, by name."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in NO_SETTINGS
        and not key.startswith('_')
        and isinstance(value, (bool, int, float, str, tuple))
    }


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
    def body(self, holder: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules of the parts whose linear layers count."""

    def units(self, holder: nn.Module) -> list[nn.Module]:
        """The blocks: they hold most weights and are called as a whole."""
        return [block for _, block in self.body(holder)]

    @abstractmethod
    def stages(self, holder: nn.Module) -> Sequence[StageSpec]:
        """The stages that lead to the last output."""

    @abstractmethod
    def run(
        self,
        holder: nn.Module,
        image: Tensor,
        last: int,
        taps: Sequence[str],
        on_tap: OnTap,
        on_end: OnEnd | None = None,
    ) -> None:
        """Run the stages up to ``last``.

        Args:
            holder (nn.Module): The backbone with the stock modules.
            image (Tensor): (B, 3, H, W).
            last (int): The last stage to run.
            taps (Sequence[str]): Which taps of a block are wanted.
            on_tap (Callable): Given each tap as soon as it is there.
            on_end (Callable, optional): Given each stage's end, before the
                next begins.
        """

    def settings(self, holder: nn.Module) -> dict[str, object]:
        """What the stock class itself, not its parts, computes with."""
        return {}

    def with_stages(self, ends: Sequence[int]) -> 'Trunk':
        """The same trunk with other stages, where it has but one resolution.

        Args:
            ends (Sequence[int]): The number of blocks up to each stage's end.
        """
        raise NotImplementedError

    @abstractmethod
    def downsampling(
        self, holder: nn.Module, stage: int, size: Size
    ) -> Downsampling | None:
        """What lies between a stage of grid ``size`` and the next.

        None if the next stage has the same tokens.
        """

    def highway_goes_on(self) -> bool:
        """Whether there is a way for it from one stage to the next."""
        return True

    @abstractmethod
    def output_norm(self, holder: nn.Module, stage: int) -> str | None:
        """Path of the stock norm at the output of a stage, if there is one."""

    def norm_goes_on(self) -> bool:
        """Whether the next stage of the trunk reads what that norm gives."""
        return False

    def output_parts(self, holder: nn.Module) -> Sequence[str]:
        """Paths of what else outputs alone go through."""
        return ()

    def gives_maps(self, holder: nn.Module) -> bool:
        """Whether outputs are maps (B, C, H, W), norms tokens' own."""
        return True

    def output(
        self,
        holder: nn.Module,
        total: Tensor,
        end: StageEnd,
        norm: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """An output that is no map.

        Args:
            holder (nn.Module): The backbone with the stock modules.
            total (Tensor): (B, extra + H * W, C), trunk and highway.
            end (StageEnd): The trunk's end of the stage.
            norm (Callable, optional): That of :meth:`output_norm`.
        """
        raise NotImplementedError

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
