"""Reading the plain ViTs of mmpretrain and mmsegmentation."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks.kernels.rotary import fit_rotations, mark_official
from e3va_mm.trunks.layout import Layout
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.stages import Size, StageEnd
from e3va_mm.trunks.trunk import Trunk
from e3va_mm.weights import describe_vit, to_vit_keys
from e3va_mm.weights.relative_tables import resize_relative_tables

NOT_IN_MAE = dict(gamma_1=1, gamma_2=1, relative_position_bias_table=0)


class VitTrunk(Trunk):
    """Position embeddings, class tokens, outputs and files of plain ViTs.

    Args:
        stock (nn.Module): The stock ViT.
        layout (Layout): That of its family.
        out_indices (Sequence[int]): Blocks that have an output, ascending.
        options (TrunkOptions, optional): How the frozen modules compute.
        family (str): Name of the stock class with its scope.

    Raises:
        ConfigError: If the stock class is asked for what is not supported.
    """

    def __init__(
        self,
        stock: nn.Module,
        layout: Layout,
        out_indices: Sequence[int],
        options: TrunkOptions | None,
        family: str,
    ) -> None:
        if getattr(stock, 'out_origin', False):
            raise ConfigError(
                '`out_origin=True` asks for the embedding as an output, where '
                'no side path is. Leave it out.'
            )
        self.family = family
        self.depth = len(stock.layers)
        super().__init__(stock, layout, out_indices, options)
        if not self._ends_the_trunk(len(self.out_stages) - 1):
            # Nothing goes through it; the stock forward takes the last block
            # that is there for the last of all.
            stock._modules.pop('ln1', None)
            stock.final_norm = False

    @property
    def extra_tokens(self) -> int:
        """See :class:`Trunk`."""
        if hasattr(self.stock, 'num_extra_tokens'):  # mmpretrain
            return self.stock.num_extra_tokens
        return int(getattr(self.stock, 'with_cls_token', True))

    def _ends_the_trunk(self, stage: int) -> bool:
        return self.out_indices[self._number(stage)] == self.depth - 1

    def output_norm(self, stage: int) -> str | None:
        """The final norm, which the stock classes give the last block."""
        if not (self.stock.final_norm and self._ends_the_trunk(stage)):
            return None
        return super().output_norm(stage)

    def output_parts(self) -> Sequence[str]:
        """See :class:`Trunk`."""
        pools = getattr(self.stock, 'out_type', None) == 'avg_featmap'
        return ('ln2',) if pools else ()

    @property
    def gives_maps(self) -> bool:
        """See :class:`Trunk`."""
        if getattr(self.stock, 'output_cls_token', False):  # mmseg
            return False
        return getattr(self.stock, 'out_type', 'featmap') == 'featmap'

    def output(
        self,
        total: Tensor,
        end: StageEnd,
        norm: Callable[[Tensor], Tensor] | None,
    ) -> Tensor | list[Tensor]:
        """See :class:`Trunk`."""
        total = total if norm is None else norm(total)
        if hasattr(self.stock, '_format_output'):
            return self.stock._format_output(total, end.size)
        grid = total[:, self.extra_tokens :]
        maps = grid.transpose(1, 2).unflatten(2, end.size).contiguous()
        return [maps, total[:, 0]]

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """See :class:`Trunk`."""
        return to_vit_keys(checkpoint, self.family)

    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Fit position embeddings and tables as the stock classes do."""
        notes = self._fit_positions(expected, found)
        notes += resize_relative_tables(expected, found)
        if hasattr(self.stock, 'rope'):
            size = tuple(self.stock.patch_resolution)
            notes += fit_rotations(expected, found, size)
            mark_official(self.stock.rope, found['rope.freqs_cos'])
        notes += self._fill_in(expected, found)
        return notes + super().adapt_state(expected, found)

    def _fill_in(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """What a kind of file never has, and what the stock hooks need."""
        table, index = (
            f'rel_pos_bias.relative_position_{name}'
            for name in ('bias_table', 'index')
        )
        for key, value in expected.items():
            if key.endswith('.relative_position_index') and table in found:
                found.setdefault(index, value)
        # MAE was trained without layer scales and relative positions.
        added = [
            key
            for key in expected
            if self.family == 'mmseg.MAE'
            and key not in found
            and key.rpartition('.')[2] in NOT_IN_MAE
        ]
        none_at_all = not any(
            key.rpartition('.')[2] in NOT_IN_MAE for key in found
        )
        if not (added and none_at_all):
            return []
        for key in added:
            fill = NOT_IN_MAE[key.rpartition('.')[2]]
            found[key] = torch.full_like(expected[key], fill)
        return ['no layer scales and relative positions in the file: 1 and 0']

    def _fit_positions(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Fit `pos_embed`, which mmseg does where it reads a file alone."""
        ours, theirs = expected.get('pos_embed'), found.get('pos_embed')
        if (
            not self.family.startswith('mmseg.')
            or ours is None
            or theirs is None
            or ours.shape == theirs.shape
            or theirs.ndim != 3
        ):
            return []
        side = int((theirs.shape[1] - 1) ** 0.5)
        grid = tuple(s // self.stock.patch_size for s in self.stock.img_size)
        square = theirs[:, 1:].transpose(1, 2)
        if square.shape[2] != side**2:
            return []
        square = F.interpolate(
            square.unflatten(2, (side, side)).float(),
            size=grid,
            mode=getattr(self.stock, 'interpolate_mode', 'bicubic'),
        )
        square = square.flatten(2).transpose(1, 2).to(theirs)
        found['pos_embed'] = torch.cat((theirs[:, :1], square), 1)
        return [f'pos_embed resized from {side}x{side} to {grid}']

    def leftovers(self) -> list[str]:
        """Also the decoder and masks of pre-training, unused norms."""
        return [
            *super().leftovers(),
            r'(decoder|lm_head|attn_pool).*',
            r'.*\.k_bias',
            r'(ln1|ln2|norm|fc_norm)\.(weight|bias)',
            r'.*\.(freqs_cos|freqs_sin|relative_position_index)',
        ]

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """See :class:`Trunk`."""
        return describe_vit(state)


class SamTrunk(VitTrunk):
    """The image encoder of SAM, whose blocks attend in windows."""

    @property
    def extra_tokens(self) -> int:
        """There are none."""
        return 0

    def _tap(
        self, block: nn.Module, tap: str, value: Tensor, grid: Size | None
    ) -> Tensor:
        """What a branch gave -> (B, L, C), windows put together again."""
        if tap == 'attn' and block.window_size:
            value = join_windows(value, block.window_size, grid)
        return self._tokens(value)

    def output_norm(self, stage: int) -> None:
        """There is none."""

    def output_parts(self) -> Sequence[str]:
        """The neck of SAM's encoder, if it is asked for."""
        return ('channel_reduction',) if self.stock.out_channels else ()

    @property
    def gives_maps(self) -> bool:
        """See :class:`Trunk`."""
        return (
            not self.stock.out_channels
            and self.stock.out_type != 'avg_featmap'
        )

    def output(
        self,
        total: Tensor,
        end: StageEnd,
        norm: None,
    ) -> Tensor:
        """See :class:`Trunk`."""
        maps = total.transpose(1, 2).unflatten(2, end.size)
        if self.stock.out_channels:
            maps = self.stock.channel_reduction(maps)
        return self.stock._format_output(maps)


def join_windows(windows: Tensor, side: int, size: Size) -> Tensor:
    """(B * windows, side, side, C) -> (B, H, W, C), padding left out."""
    rows, columns = (-(-length // side) for length in size)
    grid = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    grid = grid.flatten(3, 4).flatten(1, 2)
    return grid[:, : size[0], : size[1]]
