"""timm's Hiera, and that of SAM 2, as stock backbones."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.stored_weights import plain
from e3va_mm.registry import MODELS
from e3va_mm.trunks.kernels.layers import cast, install
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.stages import Downsampling, Size, StageEnd
from e3va_mm.trunks.timm_vit import TimmViTTrunk, created
from e3va_mm.utils.swapping import swapped
from e3va_mm.weights.state_dicts import part_of


@MODELS.register_module()
class TimmHiera(BaseModule):
    """A Hiera of timm that gives a map for each stage, for images of any size.

    Both `Hiera <https://arxiv.org/abs/2306.00989>`_ (``'hiera_base_224'``)
    and the image encoder of `SAM 2 <https://arxiv.org/abs/2408.00714>`_
    (``'sam2_hiera_base_plus'``). Outputs are those of timm's
    ``forward_intermediates``, not normalised. Hiera's position embeddings,
    made for one size, are interpolated to that of the image, as transformers
    does it.

    Args:
        model_name (str): Name of the model in timm.
        out_indices (Sequence[int]): Stages that have an output, ascending.
            Defaults to all four.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        init_cfg (Mapping, optional): See mmengine. Defaults to None.
        **kwargs: Other arguments of the model in timm.

    Raises:
        ConfigError: If timm is missing or has no such model, or the model is
            no Hiera.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        init_cfg: Mapping | None = None,
        **kwargs,
    ) -> None:
        super().__init__(init_cfg)
        self.model = model = created(
            model_name, drop_path_rate=drop_path_rate, num_classes=0, **kwargs
        )
        if type(model).__name__ not in ('Hiera', 'HieraDet'):
            raise ConfigError(
                '`model_name` of TimmHiera should be that of a Hiera, such as '
                "'hiera_base_224' or 'sam2_hiera_base_plus', but "
                f'{model_name!r} is a {type(model).__name__}.'
            )
        model.head = nn.Identity()
        self.out_indices = tuple(out_indices)
        # What position embeddings of one size are stored for.
        self.grid = tuple(getattr(model, 'tokens_spatial_shape', ()))
        # Images consist of whole windows of the first stage.
        windows = getattr(model, 'mask_unit_size', None)
        self.divisor = 4 * (windows or model.window_spec)[0]

    def init_weights(self) -> None:
        """Leave the weights as timm has drawn them, but for ``init_cfg``."""
        if self.init_cfg:
            super().init_weights()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> a map (B, C_i, H_i, W_i) for each output.

        Raises:
            ConfigError: If H or W is no multiple of the windows of the first
                stage, 32 pixels.
        """
        size = tuple(image.shape[-2:])
        if any(side % self.divisor for side in size):
            raise ConfigError(
                f'Images for Hiera should have sides of a multiple of '
                f'{self.divisor} pixels, but one has {size[0]}x{size[1]}. Set '
                f'`pad_size_divisor={self.divisor}` in '
                '`model.data_preprocessor`.'
            )
        with swapped(self.model, self._fitted(size) if self.grid else {}):
            maps = self.model.forward_intermediates(
                image,
                # Of a frozen trunk without outputs, which ends with a block.
                indices=list(self.out_indices) or None,
                intermediates_only=True,
            )
        return tuple(maps) if self.out_indices else ()

    def _fitted(self, size: Size) -> dict[str, Tensor]:
        """Let Hiera order the tokens of another image; its positions."""
        model = self.model
        grid = [a // b for a, b in zip(size, model.patch_stride, strict=True)]
        if grid != model.tokens_spatial_shape:
            sides = zip(grid, model.mask_unit_size, strict=True)
            model.tokens_spatial_shape = grid
            model.mask_spatial_shape = [a // b for a, b in sides]
            order = size, model.patch_stride, model.unroll.schedule
            model.unroll = type(model.unroll)(*order)
            model.reroll = type(model.reroll)(
                *order, model.stage_ends, model.q_pool
            )
        positions = model.pos_embed
        # Those for windows timm itself fits.
        if positions.ndim == 4 or tuple(grid) == self.grid:
            return {}
        maps = positions.transpose(1, 2).unflatten(2, self.grid)
        maps = F.interpolate(maps, size=grid, mode='bicubic')
        return dict(pos_embed=maps.flatten(2).transpose(1, 2))


class HieraTrunk(TimmViTTrunk):
    """Stages and files of :class:`TimmHiera`."""

    def _rolled(self, tokens: Tensor) -> Tensor:
        """What a block gives -> (B, H, W, C).

        Hiera's blocks have their tokens window by window.
        """
        if tokens.ndim == 4:
            return tokens
        reroll = self.stock.model.reroll
        blocks = (
            block
            for block, (_, size) in reroll.schedule.items()
            if math.prod(size) == tokens.shape[1]
        )
        return reroll(tokens, next(blocks))

    def _tokens(self, value: Tensor) -> Tensor:
        """What a block gives -> (B, L, C)."""
        return super()._tokens(self._rolled(value))

    def _end(self, output: Tensor, *args) -> StageEnd:
        """See :class:`Trunk`."""
        return super()._end(self._rolled(output), *args)

    def install_kernels(self) -> None:
        """Also keep the residual stream in single precision."""
        super().install_kernels()
        for stage in self.blocks[1:]:
            projection = self.stock.get_submodule(stage[0]).proj
            if projection is not None:
                install(projection, _Widening, self.options)

    @property
    def highway_goes_on(self) -> bool:
        """As the residual stream goes on."""
        return True

    def downsampling(self, stage: int, size: Size) -> Downsampling:
        """What the next stage's first block makes of its residual stream."""
        stride = self.stock.model.q_stride

        def gather(tokens: Tensor, norm: bool = True) -> Tensor:
            block = self.stock.get_submodule(self.blocks[stage + 1][0])
            with autocast_off(tokens):
                if block.proj is not None and norm:
                    tokens = block.proj(block.norm1(tokens))
                elif block.proj is not None:
                    weight = plain(block.proj.weight)
                    tokens = tokens @ weight.t().to(tokens.dtype)
                maps = tokens.transpose(1, 2).unflatten(2, size)
                pooled = F.max_pool2d(maps, stride)
                if block.proj is None:
                    means = F.avg_pool2d(maps, stride)
                    pooled = torch.cat([pooled, means], 1)
                return pooled.flatten(2).transpose(1, 2)

        return Downsampling(gather, None)

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """Also from files of the whole SAM 2."""
        state, form = super().to_stock_state(checkpoint)
        encoder = part_of(state, 'model.image_encoder.trunk.')
        if encoder:
            state = {f'model.{k}': v for k, v in encoder.items()}
        return state, form.replace('ViT', 'Hiera')

    def leftovers(self) -> list[str]:
        """Also the decoder of pre-training."""
        return [
            *super().leftovers(),
            r'model\.(decoder_\w+|multi_scale_fusion_heads)(\..*)?',
        ]

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """See :class:`Trunk`."""
        known = ('embed_dims', 'num_layers')
        found = super().describe(state)
        return {key: found[key] for key in known if key in found}


class _Widening:
    """A linear layer in the type it is given, whatever its weight's is."""

    def __init__(self, layer: nn.Linear, options: TrunkOptions) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        with autocast_off(x):
            return F.linear(x, *cast(self.layer, x.dtype))
