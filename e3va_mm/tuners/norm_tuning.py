"""Norm tuning: weights and biases of the norms train."""

from torch import nn

from e3va_mm.registry import MODELS
from e3va_mm.tuners.base import PETLMethod, found
from e3va_mm.tuners.blocks import Block

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@MODELS.register_module()
class NormTuning(PETLMethod):
    """Trains weight and bias of every norm of the backbone; adds nothing.

    `Strong baselines for parameter efficient few-shot fine-tuning
    <https://arxiv.org/abs/2304.01917>`_, Sec. 3 (LayerNorm tuning). Statistics
    of batch norms stay as they were pre-trained.

    Raises:
        ConfigError: If the backbone has no norm with parameters.
    """

    def attach(
        self, stock: nn.Module, blocks: list[Block]
    ) -> list[nn.Parameter]:
        """See :class:`PETLMethod`."""
        chosen = (
            parameter
            for module in stock.modules()
            if isinstance(module, NORMS)
            for parameter in module.parameters(recurse=False)
        )
        return found(chosen, stock, 'norms with parameters')
