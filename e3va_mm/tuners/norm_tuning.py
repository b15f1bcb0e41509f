"""Norm tuning: weights and biases of the norms train."""

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.trunks.trunk import NORMS
from e3va_mm.tuners.base import Tuner, require


@MODELS.register_module()
class NormTuning(Tuner):
    """Trains weight and bias of every norm of the backbone; adds nothing.

    `Strong baselines for parameter efficient few-shot fine-tuning
    <https://arxiv.org/abs/2304.01917>`_, Sec. 3 (LayerNorm tuning). Statistics
    of batch norms stay as they were pre-trained.

    Raises:
        ConfigError: If the backbone has no norm with parameters.
    """

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        found = (
            parameter
            for module in trunk.stock.modules()
            if isinstance(module, NORMS)
            for parameter in module.parameters(recurse=False)
        )
        return require(found, trunk.stock, 'norms with parameters')
