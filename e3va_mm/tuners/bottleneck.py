"""The bottleneck that adapters share: down, GELU, up."""

from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.utils import is_whole


class Bottleneck(nn.Module):
    """``up(GELU(down(x)))``, zero before the first step.

    The last layer starts at zero, weight and bias (LoRA's and AdaptFormer's
    start; Houlsby et al. take a near-zero one), so that the tuned backbone
    begins as the stock one.

    Args:
        channels (int): Channels ``C`` of the tokens.
        width (int): Channels of the bottleneck.

    Raises:
        ConfigError: If ``width`` is no whole number above zero.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        check_width(width, 'bottleneck')
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.up(F.gelu(self.down(x)))


def check_width(value: int, name: str) -> None:
    """Refuse a width that is none.

    Raises:
        ConfigError: If ``value`` is no whole number above zero.
    """
    if not is_whole(value):
        raise ConfigError(
            f'`method.{name}` should be a whole number above zero, but got '
            f'{value!r}.'
        )
