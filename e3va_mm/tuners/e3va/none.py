"""No side path: the frozen trunk alone."""

from collections.abc import Sequence

from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import StageSpec
from e3va_mm.trunks.base import Size


@MODELS.register_module()
class NoSidePath(nn.Module):
    """Takes the place of a side path and adds nothing.

    With ``train_output_norms=False`` the backbone is the frozen stock one
    under the same trunk options as the E3VA model it stands beside.

    Args:
        stages (Sequence[StageSpec]): The stages of the trunk.
        save_taps (str, optional): Of presets; there are no taps to save.
        compute (str, optional): Of presets; there are no adapters.
    """

    taps = ()

    def __init__(
        self,
        stages: Sequence[StageSpec],
        save_taps: str | None = None,
        compute: str | None = None,
    ) -> None:
        super().__init__()

    def start(self, *args) -> None:
        """Nothing to begin with."""

    def output(self, highway: None, trunk: Tensor, size: Size) -> Tensor:
        """The trunk (B, L, C) as it is."""
        return trunk

    def inherit(self, *args) -> None:
        """Nothing to carry on."""
