"""The bottleneck that adapters share: down, GELU, up."""

from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """``up(GELU(down(x)))``, zero before the first step.

    The last layer starts at zero, weight and bias (LoRA's and AdaptFormer's
    start; Houlsby et al. take a near-zero one), so that the tuned backbone
    begins as the stock one.

    Args:
        channels (int): Channels ``C`` of the tokens.
        width (int): Channels of the bottleneck.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.up(F.gelu(self.down(x)))
