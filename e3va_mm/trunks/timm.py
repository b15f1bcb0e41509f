"""timm's backbones behind mmpretrain's ``TIMMBackbone``."""

from collections.abc import Mapping

from torch import Tensor

from e3va_mm.trunks.trunk import Trunk
from e3va_mm.weights import to_stock_state


class TimmTrunk(Trunk):
    """timm's backbones behind ``TIMMBackbone``, with timm's own files."""

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """Also from the names that timm gives the whole classifier."""
        state, form = to_stock_state(checkpoint)
        ours = self.stock.state_dict()
        if any(key in ours for key in state):
            return state, form
        renamed = {}
        for key, value in state.items():
            # Lists of stages are taken apart, ViTs wrapped as a whole.
            names = (
                f'timm_model.{key}',
                f'timm_model.{key.replace(".", "_", 1)}',
                f'timm_model.model.{key}',
            )
            renamed[next((n for n in names if n in ours), key)] = value
        return renamed, 'timm'

    def leftovers(self) -> list[str]:
        """Also the classifier's norm."""
        return [*super().leftovers(), r'(timm_model\.)?norm\..*']
