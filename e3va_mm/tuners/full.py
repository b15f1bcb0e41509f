"""Full fine-tuning: the whole backbone trains."""

from collections.abc import Iterator

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import Tuner


@MODELS.register_module()
class Full(Tuner):
    """Trains all parameters of the backbone; adds none."""

    def attach(self, trunk: Trunk) -> Iterator[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        return trunk.stock.parameters()
