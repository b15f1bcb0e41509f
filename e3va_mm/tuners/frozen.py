"""A frozen backbone: neck and heads alone train."""

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.base import Tuner


@MODELS.register_module(name=['Frozen', 'Fixed'])
class Frozen(Tuner):
    """Trains no parameter of the backbone; adds none.

    The stock forward runs, in eval mode. For a frozen trunk under the trunk
    options of E3VA see :class:`~e3va_mm.tuners.e3va.no_side_path.NoSidePath`.
    """

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        return []
