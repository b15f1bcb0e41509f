"""Reading the stock ``SwinTransformer`` of mmdet and mmseg."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from mmengine.model import constant_init, trunc_normal_init
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.trunks.base import (
    Downsampling,
    OnEnd,
    OnTap,
    Size,
    StageEnd,
    StageSpec,
    Trunk,
)
from e3va_mm.trunks.kernels.feed_forward import FeedForward, install
from e3va_mm.trunks.kernels.window_attention import (
    PatchMerging,
    WindowAttention,
)
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.weights.swin_names import describe_swin, to_stock_keys

# (block, name of the tap, tap of shape (B, L, C))
OnBlockTap = Callable[[int, str, Tensor], None]
TABLE = 'relative_position_bias_table'
INDEX = 'relative_position_index'


class SwinTrunk(Trunk):
    """Stages, taps and files of Swin Transformers.

    Taps are the branch outputs before the residual addition: ``'attn'`` of
    (S)W-MSA and ``'ffn'`` of the MLP, (B, L, C) each. They are read with
    forward hooks while the stock block runs.

    Args:
        options (TrunkOptions, optional): How the frozen modules compute.
    """

    TAPS = ('attn', 'ffn')

    def __init__(self, options: TrunkOptions | None = None) -> None:
        self.options = options or TrunkOptions()

    def prepare(self, holder: nn.Module) -> None:
        """See :class:`Trunk`."""
        for stage in holder.stages:
            for block in stage.blocks:
                install(block.attn, WindowAttention, self.options)
                install(block.ffn.layers, FeedForward, self.options)
            if stage.downsample is not None:
                install(stage.downsample, PatchMerging, self.options)

    def body(self, holder: nn.Module) -> list[tuple[str, nn.Module]]:
        """See :class:`Trunk`."""
        return [('stages', holder.stages)]

    def units(self, holder: nn.Module) -> list[nn.Module]:
        """See :class:`Trunk`."""
        return [block for stage in holder.stages for block in stage.blocks]

    def stages(self, holder: nn.Module) -> list[StageSpec]:
        """See :class:`Trunk`."""
        return [
            StageSpec(
                stage.blocks[0].norm1.normalized_shape[0],
                len(stage.blocks),
                self.TAPS,
            )
            for stage in holder.stages
        ]

    def run(
        self,
        holder: nn.Module,
        image: Tensor,
        last: int,
        taps: Sequence[str],
        on_tap: OnTap,
        on_end: OnEnd | None = None,
    ) -> None:
        """See :class:`Trunk`."""
        tokens, size = self.embed(holder, image)
        for stage in range(last + 1):
            end, tokens, size = self.run_stage(
                holder, stage, tokens, size, taps, partial(on_tap, stage)
            )
            if on_end is not None:
                on_end(stage, end)

    def embed(self, holder: nn.Module, image: Tensor) -> tuple[Tensor, Size]:
        """(B, 3, H, W) -> tokens (B, L, C) and their grid.

        Raises:
            ConfigError: If the trunk has absolute position embeddings and the
                picture is not of the size they were made for.
        """
        # The residual stream starts, and stays, in single precision.
        with autocast_off(image):
            tokens, size = holder.patch_embed(image)
        if holder.use_abs_pos_embed:
            positions = holder.absolute_pos_embed
            if tokens.shape[1] != positions.shape[1]:
                raise ConfigError(
                    '`use_abs_pos_embed=True` fixes the number of tokens to '
                    f'that of `pretrain_img_size`, {positions.shape[1]}, but '
                    f'a picture of {tuple(image.shape[-2:])} pixels gives '
                    f'{tokens.shape[1]}. Resize and pad every picture to '
                    '`pretrain_img_size`, or use a trunk without absolute '
                    'position embeddings.'
                )
            tokens = tokens + positions
        return holder.drop_after_pos(tokens), size

    def run_stage(
        self,
        holder: nn.Module,
        stage: int,
        tokens: Tensor,
        size: Size,
        taps: Sequence[str],
        on_tap: OnBlockTap,
    ) -> tuple[StageEnd, Tensor, Size]:
        """Run one stage.

        Returns:
            tuple[StageEnd, Tensor, Size]: Its end, and tokens and grid after
            its downsampling, if it has one.
        """
        sequence = holder.stages[stage]
        with _tapped(sequence.blocks, taps, on_tap):
            next_tokens, next_size, tokens, size = sequence(tokens, size)
        return StageEnd(tokens, size), next_tokens, next_size

    def settings(self, holder: nn.Module) -> dict[str, object]:
        """See :class:`Trunk`."""
        return dict(use_abs_pos_embed=holder.use_abs_pos_embed)

    def downsampling(
        self, holder: nn.Module, stage: int, size: Size
    ) -> Downsampling:
        """See :class:`Trunk`."""
        merging = holder.stages[stage].downsample.forward
        return Downsampling(
            lambda tokens, norm=True: merging.gather(tokens, size, norm),
            merging.weight,
            lambda batch: merging.bands(size, batch),
        )

    def output_norm(self, holder: nn.Module, stage: int) -> str:
        """See :class:`Trunk`."""
        return f'norm{stage}'

    def init_random(self, holder: nn.Module) -> None:
        """See :class:`Trunk`."""
        if holder.use_abs_pos_embed:
            nn.init.trunc_normal_(holder.absolute_pos_embed, std=0.02)
        for part in (holder.patch_embed, holder.stages):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_init(module, std=0.02, bias=0.0)
                elif isinstance(module, nn.LayerNorm):
                    constant_init(module, 1.0)

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """See :class:`Trunk`."""
        return to_stock_keys(checkpoint)

    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Resize position tables of another window size, as stock Swin does.

        The index buffers follow from the window size alone; files of another
        window size, and slim files, leave them as they were constructed.
        """
        resized = 0
        for key, ours in expected.items():
            theirs = found.get(key)
            if key.endswith(INDEX):
                if theirs is None or theirs.shape != ours.shape:
                    found[key] = ours
            elif (
                key.endswith(TABLE)
                and theirs is not None
                and theirs.ndim == 2
                and theirs.shape != ours.shape
                and theirs.shape[1] == ours.shape[1]
            ):
                found[key] = _resize_table(theirs, ours.shape[0])
                resized += 1
        if not resized:
            return []
        return [f'{resized} position tables resized to the window size']

    def leftovers(self, holder: nn.Module) -> list[str]:
        """The classifier, masks, and whatever lies past the last output."""
        last = len(holder.stages) - 1
        later = '|'.join(
            str(i) for i in range(last + 1, len(holder.num_features))
        )
        patterns = [
            r'head\..*',
            r'norm\.(weight|bias)',
            r'.*\.attn_mask',
            r'norm\d\.(weight|bias)',
            rf'stages\.{last}\.downsample\..*',
        ]
        if later:
            patterns.append(rf'stages\.({later})\..*')
        return patterns

    def explain_mismatch(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> str:
        """See :class:`Trunk`."""
        ours, theirs = describe_swin(expected), describe_swin(found)
        if ours == theirs:
            return (
                'The trunk is of the right variant: either tensors were '
                'lost, or the side path was trained with other '
                '`side_path` options.'
            )
        return (
            f'The file holds a Swin Transformer with {_listed(theirs)}; '
            f'the config asks for {_listed(ours)}. Take the weights of '
            'the variant in the config, or change the config.'
        )


def _listed(arguments: Mapping) -> str:
    return ', '.join(f'{key}={value}' for key, value in arguments.items())


def _resize_table(table: Tensor, length: int) -> Tensor:
    """(S*S, heads) -> (length, heads), bicubic over the square."""
    old, new = int(table.shape[0] ** 0.5), int(length**0.5)
    square = table.t().reshape(1, -1, old, old)
    square = F.interpolate(square.float(), size=(new, new), mode='bicubic')
    return square.reshape(-1, length).t().contiguous().to(table.dtype)


@contextmanager
def _tapped(
    blocks: nn.ModuleList, taps: Sequence[str], on_tap: OnBlockTap
) -> Iterator[None]:
    """Hand the branch outputs of stock Swin blocks to ``on_tap``."""
    handles = []
    for index, block in enumerate(blocks):
        # The modules whose output is what the block adds to its residual.
        branches = dict(attn=block.attn, ffn=block.ffn.dropout_layer)
        for tap in taps:

            def hook(module, args, output, index=index, tap=tap):
                on_tap(index, tap, output)

            handles.append(branches[tap].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
