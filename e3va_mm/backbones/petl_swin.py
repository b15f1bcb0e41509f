"""Swin Transformer tuned from inside, over the stock class."""

from collections.abc import Mapping

from e3va_mm.backbones.e3va_swin import swin_scope
from e3va_mm.backbones.petl_backbone import PETLBackbone
from e3va_mm.backbones.stock_arguments import init_cfg_of
from e3va_mm.registry import MODELS
from e3va_mm.trunks import SwinTrunk


@MODELS.register_module()
class PETLSwinTransformer(PETLBackbone):
    """Stock Swin Transformer with a tuning method inside.

    A stock config becomes one by ``type='e3va_mm.PETLSwinTransformer'`` and
    ``method``; its other arguments stay, and mean what they mean there but
    for ``frozen_stages``, which does nothing. The stock class is mmdet's or
    mmseg's: that of the default scope, or whichever is installed.

    Args:
        method (Mapping): See :class:`PETLBackbone`.
        allow_random_trunk (bool): See :class:`PETLBackbone`.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``: an official Swin file, an MM-format backbone or
            a whole detector, .pth or .safetensors.
        pretrained (str, optional): Deprecated form of ``init_cfg``.
        convert_weights (bool): Accepted; the format is recognised.

    The remaining arguments are those of the stock class.

    Raises:
        ConfigError: See :class:`PETLBackbone`.
    """

    def __init__(
        self,
        method: Mapping,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
        pretrained: str | None = None,
        convert_weights: bool = False,
        **stock,
    ) -> None:
        super().__init__(
            dict(type=f'{swin_scope()}.SwinTransformer', **stock),
            method,
            allow_random_trunk=allow_random_trunk,
            init_cfg=init_cfg_of(init_cfg, pretrained),
        )
        self.use_abs_pos_embed = stock.get('use_abs_pos_embed', False)
        self.num_features = self._stock[0].num_features

    def _file_reader(self, reader) -> SwinTrunk:
        """Also of the official files."""
        return SwinTrunk()
