"""Reading any stock backbone while its own forward runs."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import autocast_dtype, autocast_to
from e3va_mm.numerics.products import is_traced
from e3va_mm.numerics.stored_weights import linear_layers
from e3va_mm.trunks.base import (
    Downsampling,
    OnEnd,
    OnTap,
    Size,
    StageEnd,
    StageSpec,
    Trunk,
    plain_attributes,
)
from e3va_mm.trunks.kernels.attention import ENGINES
from e3va_mm.trunks.kernels.feed_forward import (
    FeedForward,
    GatedFeedForward,
    Product,
    Wide,
    install,
)
from e3va_mm.trunks.layout import Layout, find, length_of
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.utils import is_whole
from e3va_mm.weights import to_stock_state

GATED = 'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN'
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


class StockTrunk(Trunk):
    """Runs a stock forward and reads it with forward hooks.

    The stock backbone stays what it is, but for its children: it shares their
    dictionaries with the holder, so that either sees what the other does.

    Args:
        stock (nn.Module): The stock backbone.
        layout (Layout): Where its blocks, taps and outputs are.
        out_indices (Sequence[int]): Stages, or blocks of a plain trunk, that
            have an output; ascending.
        options (TrunkOptions, optional): How the frozen modules compute.

    Raises:
        ConfigError: If the layout does not fit, or an output is not there.
    """

    def __init__(
        self,
        stock: nn.Module,
        layout: Layout,
        out_indices: Sequence[int],
        options: TrunkOptions | None = None,
    ) -> None:
        self.stock = stock
        self.layout = layout
        self.options = options or TrunkOptions()
        self.out_indices = tuple(out_indices)
        blocks = layout.find_blocks(stock)
        what, count = 'stages', len(blocks)
        if layout.plain:
            what, count = 'blocks', len(blocks[0])
        if not self.out_indices or not all(
            is_whole(index, 0, count - 1) for index in self.out_indices
        ):
            raise ConfigError(
                f'`out_indices` of the trunk should name some of its {count} '
                f'{what}, counted from 0, but got {self.out_indices}.'
            )
        if layout.plain:
            # A stage ends with each output.
            ends = [index + 1 for index in self.out_indices]
            self.blocks = _split(blocks[0], ends)
            self.out_stages = range(len(self.out_indices))
        else:
            self.blocks = blocks[: self.out_indices[-1] + 1]
            self.out_stages = self.out_indices
        outputs = () if layout.plain else self.out_stages
        layout.check(stock, len(self.blocks), outputs)
        self._cut()

    def _cut(self) -> None:
        """Nothing past the last output stays, where the stock loop allows."""
        before = set(self.stock.state_dict())
        if self.layout.cut is not None:
            self._cut_behind(self.out_indices[-1])
        self.removed = before - set(self.stock.state_dict())
        # Its own outputs would be made for nothing.
        self.stock.out_indices = ()
        self.stock.training = False

    def _cut_behind(self, last: int) -> None:
        whole = self.stock.get_submodule(self.layout.cut)
        count = len(whole)
        del whole[last + 1 :]
        if self.layout.plain:
            return
        # What else there is once for each stage; Twins count by these.
        for child in self.stock.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                del child[last + 1 :]
        if hasattr(self.stock, 'depths'):
            self.stock.depths = self.stock.depths[: last + 1]
        if hasattr(self.stock, 'num_stage'):
            self.stock.num_stage = last + 1
        for stage in range(last + 1, count):
            norm = self.layout.path(self.layout.output_norm or '', stage)
            self.stock._modules.pop(norm, None)
        # A downsampling at the end of a stage.
        if hasattr(whole[last], 'downsample') and any(
            '{next}' not in template for template in self.layout.downsampling
        ):
            whole[last].downsample = None

    def share(self, holder: nn.Module) -> None:
        """Let the stock backbone run on the holder's children."""
        for name in ('_modules', '_parameters', '_buffers'):
            setattr(self.stock, name, getattr(holder, name))

    def prepare(self, holder: nn.Module) -> None:
        """See :class:`Trunk`."""
        self.share(holder)
        for path in [*self.layout.embedding, *self._between()]:
            module = find(self.stock, path)
            if isinstance(module, nn.Module):
                install(module, Wide, self.options)
        for _, block in self.body(holder):
            for module in block.modules():
                kind = self._engine(module)
                if kind is not None:
                    install(module, kind, self.options)
                elif isinstance(module, FFN):
                    install(module.layers, FeedForward, self.options)

    def _engine(self, module: nn.Module) -> type | None:
        """What computes instead of a module, if anything does."""
        if type(module) is nn.Linear:
            return Product
        # A subclass with a forward of its own is another thing.
        owner = next(c for c in type(module).__mro__ if 'forward' in vars(c))
        name = f'{owner.__module__}.{owner.__qualname__}'
        return GatedFeedForward if name == GATED else ENGINES.get(name)

    def _between(self) -> Iterator[str]:
        """Paths of the downsamplings."""
        for stage in range(len(self.blocks) - 1):
            for template in self.layout.downsampling:
                yield self.layout.path(template, stage)

    def body(self, holder: nn.Module) -> list[tuple[str, nn.Module]]:
        """See :class:`Trunk`."""
        return [
            (path, self.stock.get_submodule(path))
            for blocks in self.blocks
            for path in blocks
        ]

    def stages(self, holder: nn.Module) -> list[StageSpec]:
        """See :class:`Trunk`."""
        return [
            StageSpec(
                length_of(find(self.stock, f'{b[0]}.{self.layout.channels}')),
                len(b),
                tuple(self.layout.taps),
            )
            for b in self.blocks
        ]

    # -- running ------------------------------------------------------------

    def settings(self, holder: nn.Module) -> dict[str, object]:
        """See :class:`Trunk`."""
        return plain_attributes(self.stock)

    def with_stages(self, ends: Sequence[int]) -> 'StockTrunk':
        """See :class:`Trunk`."""
        other = copy.copy(self)
        other.blocks = _split([*itertools.chain(*self.blocks)], ends)
        return other

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
        inner = self.options.dtype(self._weight())
        if inner not in (torch.bfloat16, torch.float16):
            inner = None
        # The side path is none of the trunk's business.
        outer = autocast_dtype(image)
        on_tap = _under(on_tap, image, outer)
        on_end = on_end and _under(on_end, image, outer)
        with (
            self._hooked(image, last, taps, on_tap, on_end),
            autocast_to(image, inner),
        ):
            try:
                self.stock.forward(image)
            except _LastStage:
                pass

    def _weight(self) -> Tensor:
        """What says in which type blocks compute."""
        first = self.stock.get_submodule(self.blocks[0][0])
        for _, layer in linear_layers(first):
            return layer.weight
        return next(first.parameters())

    @contextmanager
    def _hooked(
        self,
        image: Tensor,
        last: int,
        taps: Sequence[str],
        on_tap: OnTap,
        on_end: OnEnd | None,
    ) -> Iterator[None]:
        """Hooks that hand out taps and stage ends, for one pass."""
        handles = []
        grid = {}  # of the first tokens, where the embedding tells it

        def embedded(module, args, output):
            if isinstance(output, (tuple, list)) and len(output) == 2:
                grid['size'] = tuple(output[1])

        if self.layout.embedding:
            first = self.stock.get_submodule(self.layout.embedding[0])
            handles.append(first.register_forward_hook(embedded))
        picture = tuple(image.shape[-2:])
        for stage, paths in enumerate(self.blocks[: last + 1]):
            for index, path in enumerate(paths):
                block = self.stock.get_submodule(path)

                def taken(tap, value, block=block, at=(stage, index)):
                    value = self._tap(block, tap, value, grid.get('size'))
                    on_tap(*at, tap, value)

                handles += self._tap_hooks(block, taps, taken)

            def end(module, args, output, stage=stage):
                if on_end is not None:
                    size = grid.get('size') if self.layout.plain else None
                    on_end(stage, self._end(output, args, size, picture))
                # Writers of graphs cannot see a forward that ends midway.
                if stage == last and not is_traced():
                    raise _LastStage

            # The block with the last index, which `block` is now.
            handles.append(block.register_forward_hook(end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap_hooks(
        self,
        block: nn.Module,
        taps: Sequence[str],
        taken: Callable[[str, Tensor], None],
    ) -> Iterator:
        """Hooks on the branches of a block."""
        wanted = {}
        for tap in taps:
            path, _, call = self.layout.taps[tap].partition('#')
            wanted.setdefault(path, {})[int(call or 1)] = tap
        often = {
            path: sum(
                path == inner.partition('#')[0]
                for inner in self.layout.taps.values()
            )
            for path in wanted
        }
        for path, calls in wanted.items():
            done = itertools.count()

            def hook(module, args, output, path=path, calls=calls, done=done):
                # Blocks call a module as often each time they run.
                tap = calls.get(next(done) % often[path] + 1)
                if tap is not None:
                    taken(tap, output)

            yield block.get_submodule(path).register_forward_hook(hook)

    def _tap(
        self, block: nn.Module, tap: str, value: Tensor, grid: Size | None
    ) -> Tensor:
        """What a branch gave -> (B, L, C)."""
        return self._tokens(value)

    def _tokens(self, value: Tensor) -> Tensor:
        """Tokens or a map -> (B, L, C)."""
        if value.ndim == 3:
            return value
        if self.layout.channels_last:
            return value.flatten(1, 2)
        return value.flatten(2).transpose(1, 2)

    def _end(
        self,
        output: Tensor | tuple,
        args: tuple,
        grid: Size | None,
        picture: Size,
    ) -> StageEnd:
        """What the last block of a stage gave, with its grid."""
        value = output[0] if isinstance(output, (tuple, list)) else output
        if value.ndim == 4:
            size = (
                value.shape[1:3]
                if self.layout.channels_last
                else (value.shape[2:])
            )
            return StageEnd(self._tokens(value).contiguous(), tuple(size))
        size = grid or grid_of(args, value, self.extra_tokens, picture)
        return StageEnd(value, size)

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the picture."""
        if self.layout.extra_tokens is None:
            return 0
        return find(self.stock, self.layout.path(self.layout.extra_tokens))

    # -- between and behind stages ------------------------------------------

    def downsampling(
        self, holder: nn.Module, stage: int, size: Size
    ) -> Downsampling | None:
        """See :class:`Trunk`."""
        if self.layout.plain:
            return None
        modules = [
            find(self.stock, self.layout.path(template, stage))
            for template in self.layout.downsampling
        ]
        modules = [m for m in modules if isinstance(m, nn.Module)]

        def gather(tokens: Tensor, norm: bool = True) -> Tensor:
            if norm:
                return self._through(modules, tokens, size)
            with _without_norms(modules):
                origin = torch.zeros_like(tokens[:1])
                return self._through(modules, tokens, size) - self._through(
                    modules, origin, size
                )

        return Downsampling(gather, None)

    def _through(
        self, modules: Sequence[nn.Module], tokens: Tensor, size: Size
    ) -> Tensor:
        """(B, L, C) through stock modules, in whatever form they take it."""
        for module in modules:
            if isinstance(module, NORMS):
                tokens = module(tokens)
                continue
            if _takes_size(module):
                output = module(tokens, size)
            else:
                maps = tokens.unflatten(1, size)
                if not self.layout.channels_last:
                    maps = maps.permute(0, 3, 1, 2)
                output = module(maps)
            parts = output if isinstance(output, (tuple, list)) else [output]
            tokens = self._tokens(parts[0])
            if parts[0].ndim == 4:
                shape = parts[0].shape
                size = tuple(
                    shape[1:3] if self.layout.channels_last else shape[2:]
                )
            else:
                size = _size_among(parts[1:], tokens.shape[1])
        return tokens

    def highway_goes_on(self) -> bool:
        """See :class:`Trunk`."""
        return self.layout.plain or bool(self.layout.downsampling)

    def output_norm(self, holder: nn.Module, stage: int) -> str | None:
        """See :class:`Trunk`."""
        if self.layout.output_norm is None:
            return None
        path = self.layout.path(self.layout.output_norm, stage)
        norm = find(self.stock, path)
        return path if _is_norm(norm) else None

    def norm_goes_on(self) -> bool:
        """See :class:`Trunk`."""
        return self.layout.norm_goes_on

    def gives_maps(self, holder: nn.Module) -> bool:
        """See :class:`Trunk`."""
        return not (
            self.layout.pools and getattr(self.stock, self.layout.pools)
        )

    def output(
        self,
        holder: nn.Module,
        total: Tensor,
        end: StageEnd,
        norm,
    ) -> Tensor:
        """The mean over a map, normalised: (B, C)."""
        pooled = total.mean(1)
        return pooled if norm is None else norm(pooled)

    # -- files --------------------------------------------------------------

    def init_random(self, holder: nn.Module) -> None:
        """See :class:`Trunk`."""
        # Stock code draws all that is below it; what is added has its own.
        added = holder._modules.pop(holder.ADDED)
        # What a whole model notes about its initialisation.
        notes = vars(holder).get('_params_init_info')
        if notes is not None:
            self.stock._params_init_info = notes
        try:
            self.stock.init_weights()
        finally:
            holder._modules[holder.ADDED] = added
            vars(self.stock).pop('_params_init_info', None)

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """See :class:`Trunk`."""
        return to_stock_state(checkpoint)

    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Let the stock class's own hooks fit what a file holds.

        What they take out, and index buffers that follow from the
        configuration, stay as they were constructed.
        """
        before = dict(found)
        for hook in self.stock._load_state_dict_pre_hooks.values():
            hook(found, '', {}, False, [], [], [])
        for key, ours in expected.items():
            theirs = found.get(key)
            gone = key in before and theirs is None
            index = not ours.is_floating_point() and (
                theirs is None or theirs.shape != ours.shape
            )
            if gone or index:
                found[key] = ours
        changed = [
            key
            for key, value in before.items()
            if key in found and found[key].shape != value.shape
        ]
        if not changed:
            return []
        return [f'{len(changed)} position tables resized: {changed[0]}, ...']

    def leftovers(self, holder: nn.Module) -> list[str]:
        """Heads, masks, other outputs' norms, what lies past the last."""
        patterns = [
            r'(head|fc|fc_norm|head_drop|classifier)\..*',
            r'mask_token',
            r'.*\.attn_mask',
            *map(re.escape, self.removed),
        ]
        if self.layout.output_norm is not None:
            norm = re.escape(self.layout.output_norm.removesuffix('?'))
            norm = norm.replace(re.escape('{stage}'), r'\d+')
            patterns.append(norm + r'\.(weight|bias)')
        return patterns

    def explain_mismatch(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> str:
        """See :class:`Trunk`."""
        return (
            f'The config asks for a {type(self.stock).__name__}. Take the '
            'weights of the same class and variant, bring those of another '
            'project to its names with the model converters of the '
            'frameworks or of tools/model_converters, or change the config.'
        )


class TimmTrunk(StockTrunk):
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

    def leftovers(self, holder: nn.Module) -> list[str]:
        """Also the classifier's norm."""
        return [*super().leftovers(holder), r'(timm_model\.)?norm\..*']


class _LastStage(Exception):
    """Ends a stock forward behind the last stage that is wanted."""


def _split(blocks: Sequence[str], ends: Sequence[int]) -> list[Sequence[str]]:
    """Stages of the blocks up to each end."""
    return [blocks[a:b] for a, b in itertools.pairwise([0, *ends])]


def _under(
    function: Callable, like: Tensor, dtype: torch.dtype | None
) -> Callable:
    """A function that runs under an autocast of its own."""

    def run(*args):
        with autocast_to(like, dtype):
            return function(*args)

    return run


def _is_norm(module: object) -> bool:
    return isinstance(module, nn.Module) and any(
        True for _ in module.parameters(recurse=False)
    )


def _size_among(args: Sequence, length: int) -> Size | None:
    """The grid (H, W) of ``length`` tokens among positional arguments."""
    pairs = [a for a in args if isinstance(a, (tuple, list, torch.Size))]
    pairs += itertools.pairwise(args)
    for pair in pairs:
        if (
            len(pair) == 2
            and all(isinstance(side, int) for side in pair)
            and pair[0] * pair[1] == length
        ):
            return tuple(pair)
    return None


def grid_of(
    inputs: Sequence, value: Tensor, extra: int, picture: Size
) -> Size:
    """The grid (H, W) of the picture's tokens.

    Args:
        inputs (Sequence): What a block was called with, which may tell it.
        value (Tensor): (B, extra + H * W, C) or (B, H, W, C).
        extra (int): Tokens before those of the picture.
        picture (tuple[int, int]): Height and width in pixels.

    Raises:
        ConfigError: If there is none.
    """
    if value.ndim == 4:
        return tuple(value.shape[1:3])
    length = value.shape[1] - extra
    return _size_among(inputs, length) or _grid(picture, length)


def _grid(picture: Size, length: int) -> Size:
    """The grid of ``length`` square patches of a picture.

    Raises:
        ConfigError: If there is none.
    """
    height = round(math.sqrt(length * picture[0] / picture[1]))
    if not height or length % height:
        raise ConfigError(
            f'A picture of {picture[0]}x{picture[1]} pixels gave {length} '
            'tokens, which are no grid of its shape. If the trunk puts tokens '
            'before those of the picture, name their number in '
            '`layout.extra_tokens`; else pad pictures to a multiple of the '
            'patch size.'
        )
    return height, length // height


def _takes_size(module: nn.Module) -> bool:
    """Whether a module is called with tokens and their grid."""
    forward = type(module).forward
    names = forward.__code__.co_varnames[1 : forward.__code__.co_argcount]
    return len(names) > 1


@contextmanager
def _without_norms(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Norms below ``modules`` give what they are given."""
    norms = {
        module: module.forward
        for root in modules
        for module in root.modules()
        if isinstance(module, NORMS)
    }
    for norm in norms:
        norm.forward = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        for norm, forward in norms.items():
            norm.forward = forward
