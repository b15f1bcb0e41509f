"""Any stock backbone with a side path."""

from collections.abc import Mapping

from e3va_mm.backbones.presets import resolve_side_path
from e3va_mm.backbones.side_path_backbone import SidePathBackbone
from e3va_mm.backbones.stock_arguments import (
    build_stock,
    say_without_effect,
    taken_apart,
)
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Layout
from e3va_mm.trunks.building import build_trunk


@MODELS.register_module()
class E3VABackbone(SidePathBackbone):
    """A frozen stock backbone of any family with an E3VA side path.

    `Parameter-efficient is not sufficient
    <https://arxiv.org/abs/2306.09729>`_. The stock backbone's config goes into
    ``trunk``; outputs, state dict and files stay those of the stock class.

    Args:
        trunk (Mapping): Config of the stock backbone, such as
            ``dict(type='mmpretrain.SwinTransformerV2', arch='base')``, with
            its ``out_indices``. Its ``init_cfg`` may be here or outside.
        layout (Mapping, optional): Where its blocks, taps and outputs are:
            the fields of :class:`~e3va_mm.trunks.Layout`. Needed for a
            family that is not in the table, see
            :mod:`e3va_mm.trunks.families`.
        side_path (Mapping, optional): As for
            :class:`~e3va_mm.models.E3VASwinTransformer`.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``. Every trunk weight must arrive.

    Raises:
        ConfigError: If the trunk is of no known family and there is no
            ``layout``, or an argument is unknown or out of range.
    """

    def __init__(
        self,
        trunk: Mapping,
        layout: Mapping | None = None,
        side_path: Mapping | None = None,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
    ) -> None:
        kind, stock, init_cfg = taken_apart(trunk, init_cfg)
        say_without_effect(type(self).__name__, stock)
        layout = None if layout is None else Layout.of(layout)
        _, options = resolve_side_path(side_path)
        built = build_stock(kind, stock, options.drop_path)
        reader = build_trunk(built, options, layout)
        side_path, _ = resolve_side_path(side_path, reader.layout.plain)
        super().__init__(
            reader,
            built,
            reader.out_stages,
            side_path=side_path,
            allow_random_trunk=allow_random_trunk,
            init_cfg=init_cfg,
        )
        self.out_indices = reader.out_indices
        if getattr(built, '_is_init', False):
            self.storage.source = f'{type(built).__name__} itself'
