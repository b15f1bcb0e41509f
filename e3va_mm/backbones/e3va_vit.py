"""Vision Transformer with a side path, over the stock classes."""

from collections.abc import Mapping

from e3va_mm.backbones.presets import resolve_side_path
from e3va_mm.backbones.side_path_backbone import SidePathBackbone
from e3va_mm.backbones.stock_arguments import (
    build_stock,
    current_scope,
    init_cfg_of,
    say_without_effect,
)
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.building import build_trunk, scoped_name


@MODELS.register_module()
class E3VAVisionTransformer(SidePathBackbone):
    """Frozen stock ViT with an E3VA side path.

    `Parameter-efficient is not sufficient
    <https://arxiv.org/abs/2306.09729>`_. A stock config becomes an E3VA config
    by ``type='e3va_mm.E3VAVisionTransformer'``; its other arguments stay.

    A plain ViT has one resolution: adapters read both branches of every block
    up to the last output, and the highway goes on from one output to the next
    without a downsampling. Outputs are maps (B, C, H, W), as many as
    ``out_indices``, all of one size; what UperNet's necks of mmsegmentation
    expect. For FPN-type necks see
    :class:`~e3va_mm.models.SimpleFeaturePyramid`.

    The final norm of the stock class trains, where the last block is an
    output; class token, registers, position embeddings and layer scales are
    the trunk's and stay.

    Args:
        trunk_type (str, optional): The stock class: of mmpretrain
            ``'mmpretrain.VisionTransformer'`` (DeiT, MAE, CLIP, DINOv2),
            ``'mmpretrain.BEiTViT'``, ``'mmpretrain.ViTEVA02'`` or
            ``'mmpretrain.ViTSAM'``; of mmsegmentation
            ``'mmseg.VisionTransformer'``, ``'mmseg.BEiT'`` or ``'mmseg.MAE'``.
            Defaults to the ``VisionTransformer`` of mmsegmentation where its
            tools run, else to that of mmpretrain.
        side_path (Mapping, optional): As for
            :class:`~e3va_mm.models.E3VASwinTransformer`. ``save_taps`` may
            name one mode for each output instead of each stage.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``: a file of the stock class, or an official one
            of DINOv2, MAE, SAM, BEiT or timm. Every trunk weight must arrive.
        pretrained (str, optional): Deprecated form of ``init_cfg``.
        **stock: Arguments of the stock class. ``out_type`` of mmpretrain's is
            ``'featmap'`` by default, but for mmpretrain's own tools.

    Raises:
        ConfigError: If an argument is unknown or out of range, or the stock
            class is not there.
    """

    def __init__(
        self,
        trunk_type: str | None = None,
        side_path: Mapping | None = None,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
        pretrained: str | None = None,
        **stock,
    ) -> None:
        if trunk_type is not None:
            stock['trunk_type'] = trunk_type
        stock = vit_trunk_config(stock, current_scope())
        trunk_type = stock.pop('type')
        say_without_effect(type(self).__name__, stock)
        side_path, options = resolve_side_path(side_path, plain=True)
        trunk = build_trunk(
            build_stock(trunk_type, stock, options.drop_path), options
        )
        super().__init__(
            trunk,
            trunk.stock,
            trunk.out_stages,
            side_path=side_path,
            allow_random_trunk=allow_random_trunk,
            init_cfg=init_cfg_of(init_cfg, pretrained),
        )
        self.out_indices = trunk.out_indices


def vit_trunk_config(arguments: Mapping, scope: str | None) -> dict:
    """The stock backbone that :class:`E3VAVisionTransformer` takes.

    Args:
        arguments (Mapping): ``trunk_type``, if given, and those of the stock
            class.
        scope (str, optional): The framework whose tools run.
    """
    stock = dict(arguments)
    owner = 'mmseg' if scope == 'mmseg' else 'mmpretrain'
    kind = stock.pop('trunk_type', None) or f'{owner}.VisionTransformer'
    if isinstance(kind, type):  # in configs of the new style
        kind = scoped_name(kind)
    if not isinstance(kind, str):
        raise ConfigError(
            '`trunk_type` should be the name of a stock class, such as '
            f"'mmpretrain.VisionTransformer', but got {kind!r}."
        )
    if kind.startswith('mmpretrain.') and scope != 'mmpretrain':
        stock.setdefault('out_type', 'featmap')
    return dict(stock, type=kind)
