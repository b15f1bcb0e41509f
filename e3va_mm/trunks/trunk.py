"""Reading a stock backbone while its own forward runs."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import autocast_dtype, autocast_to
from e3va_mm.numerics.products import is_traced
from e3va_mm.numerics.stored_weights import linear_layers
from e3va_mm.trunks.files import TrunkFiles
from e3va_mm.trunks.kernels import kernel_of
from e3va_mm.trunks.kernels.layers import FeedForward, FullPrecision, install
from e3va_mm.trunks.kernels.window_attention import PatchMerging
from e3va_mm.trunks.kernels.windows import windows_of_a_pass
from e3va_mm.trunks.layout import Layout, find, length_of, split
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.stages import (
    STREAM,
    Downsampling,
    OnEnd,
    OnTap,
    Size,
    StageEnd,
    StageSpec,
)
from e3va_mm.utils import is_whole

NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
# What a stock backbone knows of training and of its own outputs alone.
NO_SETTINGS = (
    'attn_drop_rate',
    'convert_weights',
    'drop_path_rate',
    'drop_rate',
    'final_norm',
    'frozen_stages',
    'norm_eval',
    'out_indices',
    'out_origin',
    'out_type',
    'output_cls_token',
    'pretrained',
    'training',
    'with_cp',
)


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Numbers, texts and tuples that a module computes with, by name."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in NO_SETTINGS
        and not key.startswith('_')
        and isinstance(value, (bool, int, float, str, tuple))
    }


class Trunk(TrunkFiles):
    """Reads one stock backbone by its layout; knows no tuner.

    It owns nothing. Its forward pass is the stock class's own, which hooks
    read: taps as soon as they are there, and the end of each stage.

    Args:
        stock (nn.Module): The stock backbone. What lies past its last output
            is cut off.
        layout (Layout): Where its blocks, taps and outputs are.
        out_indices (Sequence[int]): Stages, or blocks of a plain trunk, that
            have an output; ascending.
        options (TrunkOptions, optional): How the frozen modules compute.

    Attributes:
        stock_class (type): The stock class.
        blocks (list[Sequence[str]]): Paths of the blocks of each stage.
        out_stages (Sequence[int]): Stages that have an output.
        settings (dict): What the stock class itself computes with.

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
        self.stock_class = type(stock)
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
            self.blocks = split(blocks[0], ends)
            self.out_stages = range(len(self.out_indices))
        else:
            self.blocks = blocks[: self.out_indices[-1] + 1]
            self.out_stages = self.out_indices
        outputs = () if layout.plain else self.out_stages
        layout.check(stock, len(self.blocks), outputs)
        before = set(stock.state_dict())
        if layout.cut is not None:
            self._cut(self.out_indices[-1])
        self.removed = before - set(stock.state_dict())
        self.settings = plain_attributes(stock)
        # Those fit what a file holds; here that is done before it is checked.
        self._load_hooks = [*stock._load_state_dict_pre_hooks.values()]
        stock._load_state_dict_pre_hooks.clear()
        # Height and width of the newest image, where the stock class runs.
        self.pixels: Size = (0, 0)

    def _cut(self, last: int) -> None:
        """Leave nothing behind the last output."""
        whole = self.stock.get_submodule(self.layout.cut)
        count = len(whole)
        if self.layout.flat:
            del whole[sum(map(len, self.blocks)) :]
            return
        del whole[last + 1 :]
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

    def install_kernels(self) -> None:
        """Let the frozen modules compute without a graph, as options say."""
        embedding = (find(self.stock, path) for path in self.layout.embedding)
        between = (module for _, module in self._between())
        for module in [*embedding, *between]:
            if isinstance(module, nn.Module):
                kind = kernel_of(module) or FullPrecision
                install(module, kind, self.options)
        for _, block in self.body():
            for module in block.modules():
                kind = kernel_of(module)
                if kind is not None:
                    install(module, kind, self.options)
                elif isinstance(module, FFN):
                    install(module.layers, FeedForward, self.options)

    def body(self) -> list[tuple[str, nn.Module]]:
        """Paths and modules of the blocks."""
        return [
            (path, self.stock.get_submodule(path))
            for path in itertools.chain(*self.blocks)
        ]

    def stored_parts(self) -> list[tuple[str, nn.Module]]:
        """Paths and modules whose linear layers are stored as options say."""
        merging = (
            (path, module)
            for path, module in self._between()
            if isinstance(module, nn.Module)
            and kernel_of(module) is PatchMerging
        )
        return [*self.body(), *merging]

    def _between(self) -> Iterator[tuple[str, object]]:
        """Paths and modules of the downsamplings."""
        for stage in range(len(self.blocks) - 1):
            for template in self.layout.downsampling:
                path = self.layout.path(template, stage)
                yield path, find(self.stock, path)

    def stages(self) -> list[StageSpec]:
        """The stages that lead to the last output."""
        return [
            StageSpec(
                length_of(find(self.stock, f'{b[0]}.{self.layout.channels}')),
                len(b),
                tuple(self.layout.taps),
            )
            for b in self.blocks
        ]

    def with_stages(self, ends: Sequence[int]) -> 'Trunk':
        """The same trunk with other stages, where it has one resolution.

        Args:
            ends (Sequence[int]): The number of blocks up to each stage's end.
        """
        other = copy.copy(self)
        other.blocks = split([*itertools.chain(*self.blocks)], ends)
        return other

    def divide(self, every: int) -> None:
        """End a stage at least every so many blocks; outputs stay.

        Raises:
            ConfigError: If the trunk has several resolutions.
        """
        if not self.layout.plain:
            raise ConfigError(
                '`tuner.mix_every` is for trunks of one resolution, but '
                f'{self.stock_class.__name__} has stages of its own. Leave it '
                'out.'
            )
        before = [*itertools.accumulate(map(len, self.blocks))]
        ends = sorted({*before, *range(every, before[-1], every)})
        self.blocks = split([*itertools.chain(*self.blocks)], ends)
        self.out_stages = tuple(ends.index(before[s]) for s in self.out_stages)

    # -- running ------------------------------------------------------------

    def run(
        self,
        image: Tensor,
        last: int,
        taps: Sequence[str],
        on_tap: OnTap,
        on_end: OnEnd | None = None,
    ) -> None:
        """Run the stages up to ``last``.

        Args:
            image (Tensor): (B, 3, H, W).
            last (int): The last stage to run.
            taps (Sequence[str]): Which taps of a block are wanted: names of
                the layout, ``STREAM``.
            on_tap (Callable): Given each tap as soon as it is there.
            on_end (Callable, optional): Given each stage's end, before the
                next begins.
        """
        inner = self.options.dtype(self._weight())
        if inner not in (torch.bfloat16, torch.float16):
            inner = None
        # The side path keeps the autocast that it came with.
        outer = autocast_dtype(image)
        on_tap = _under(on_tap, image, outer)
        on_end = on_end and _under(on_end, image, outer)
        with (
            self._without_outputs(),
            self._hooked(image, last, taps, on_tap, on_end),
            autocast_to(image, inner),
            windows_of_a_pass(image.device),
        ):
            try:
                self.stock_class.forward(self.stock, image)
            except _LastStage:
                pass

    @contextmanager
    def _without_outputs(self) -> Iterator[None]:
        """The stock forward makes no outputs and is in eval mode."""
        own = vars(self.stock)
        before = {k: own[k] for k in ('out_indices', 'training') if k in own}
        own.update(out_indices=(), training=False)
        try:
            yield
        finally:
            own.pop('out_indices')
            own.update(before)

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
                self.check_embedding(output[0], image)
                grid['size'] = tuple(output[1])

        if self.layout.embedding:
            first = self.stock.get_submodule(self.layout.embedding[0])
            handles.append(first.register_forward_hook(embedded))
        pixels = tuple(image.shape[-2:])
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
                    on_end(stage, self._end(output, args, size, pixels))
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
        """Hooks on the branches of a block, and on itself."""
        if STREAM in taps:
            yield block.register_forward_hook(
                lambda module, args, output: taken(STREAM, _first(output))
            )
        wanted = {}
        for tap in (tap for tap in taps if tap != STREAM):
            path, _, call = self.layout.taps[tap].partition('#')
            wanted.setdefault(path, {})[int(call or 1)] = tap
        for path, calls in wanted.items():
            often = sum(
                path == inner.partition('#')[0]
                for inner in self.layout.taps.values()
            )
            done = itertools.count()

            def hook(
                module, args, output, calls=calls, done=done, often=often
            ):
                # Blocks call a module as often each time they run.
                tap = calls.get(next(done) % often + 1)
                if tap is not None:
                    taken(tap, output)

            yield block.get_submodule(path).register_forward_hook(hook)

    def check_embedding(self, tokens: Tensor, image: Tensor) -> None:
        """Refuse an image that the stock forward would fail with."""

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

    def _map_size(self, maps: Tensor) -> Size:
        shape = maps.shape
        return tuple(shape[1:3] if self.layout.channels_last else shape[2:])

    def _end(
        self,
        output: Tensor | tuple,
        args: tuple,
        grid: Size | None,
        pixels: Size,
    ) -> StageEnd:
        """What the last block of a stage gave, with its grid."""
        value = _first(output)
        if value.ndim == 4:
            tokens = self._tokens(value).contiguous()
            return StageEnd(tokens, self._map_size(value))
        size = grid or grid_of(args, value, self.extra_tokens, pixels)
        return StageEnd(value, size)

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the image."""
        if self.layout.extra_tokens is None:
            return 0
        return find(self.stock, self.layout.path(self.layout.extra_tokens))

    # -- between and behind stages ------------------------------------------

    def downsampling(self, stage: int, size: Size) -> Downsampling | None:
        """What lies between a stage of grid ``size`` and the next.

        None if the next stage has the same tokens.
        """
        if self.layout.plain:
            return None
        modules = [
            find(self.stock, self.layout.path(template, stage))
            for template in self.layout.downsampling
        ]
        modules = [m for m in modules if isinstance(m, nn.Module)]
        if len(modules) == 1 and isinstance(modules[0].forward, PatchMerging):
            merging = modules[0].forward
            return Downsampling(
                lambda tokens, norm=True: merging.gather(tokens, size, norm),
                merging.weight,
                lambda batch: merging.bands(size, batch),
            )

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
                size = self._map_size(parts[0])
            else:
                size = _size_among(parts[1:], tokens.shape[1])
        return tokens

    @property
    def highway_goes_on(self) -> bool:
        """Whether there is a way for it from one stage to the next."""
        return self.layout.plain or bool(self.layout.downsampling)

    def _number(self, stage: int) -> int:
        """By which paths name a stage with an output."""
        plain = self.layout.plain
        return self.out_stages.index(stage) if plain else stage

    def output_norm(self, stage: int) -> str | None:
        """Path of the stock norm at the output of a stage, if there is one."""
        if self.layout.output_norm is None:
            return None
        path = self.layout.path(self.layout.output_norm, self._number(stage))
        norm = find(self.stock, path)
        has_weights = isinstance(norm, nn.Module) and any(
            True for _ in norm.parameters(recurse=False)
        )
        return path if has_weights else None

    @property
    def norm_goes_on(self) -> bool:
        """Whether the next stage of the trunk reads what that norm gives."""
        return self.layout.norm_goes_on

    def output_parts(self) -> Sequence[str]:
        """Paths of what else outputs alone go through."""
        return ()

    @property
    def gives_maps(self) -> bool:
        """Whether outputs are maps (B, C, H, W), norms tokens' own."""
        return not (
            self.layout.pools and getattr(self.stock, self.layout.pools)
        )

    def output(
        self,
        total: Tensor,
        end: StageEnd,
        norm: Callable[[Tensor], Tensor] | None,
    ) -> Tensor | list[Tensor]:
        """An output that is no map, here the normalised mean (B, C).

        Args:
            total (Tensor): (B, extra + H * W, C), trunk and highway.
            end (StageEnd): The trunk's end of the stage.
            norm (Callable, optional): That of :meth:`output_norm`.
        """
        pooled = total.mean(1)
        return pooled if norm is None else norm(pooled)


class _LastStage(Exception):
    """Ends a stock forward behind the last stage that is wanted."""


def _first(output: Tensor | Sequence) -> Tensor:
    """What a module gives, or the first of what it gives."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _under(
    function: Callable, like: Tensor, dtype: torch.dtype | None
) -> Callable:
    """A function that runs under an autocast of its own."""

    def run(*args):
        with autocast_to(like, dtype):
            return function(*args)

    return run


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


def grid_of(inputs: Sequence, value: Tensor, extra: int, pixels: Size) -> Size:
    """The grid (H, W) of the image's tokens.

    Args:
        inputs (Sequence): What a block was called with, which may tell it.
        value (Tensor): (B, extra + H * W, C) or (B, H, W, C).
        extra (int): Tokens before those of the image.
        pixels (tuple[int, int]): Height and width of the image.

    Raises:
        ConfigError: If there is none.
    """
    if value.ndim == 4:
        return tuple(value.shape[1:3])
    length = value.shape[1] - extra
    found = _size_among(inputs, length)
    if found is not None:
        return found
    height = round(math.sqrt(length * pixels[0] / pixels[1]))
    if not height or length % height:
        raise ConfigError(
            f'An image of {pixels[0]}x{pixels[1]} pixels gave {length} '
            'tokens, which are no grid of its shape. If the trunk puts tokens '
            'before those of the image, name their number in '
            '`layout.extra_tokens`; else pad images to a multiple of the '
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
    own = {
        module: vars(module).get('forward')
        for root in modules
        for module in root.modules()
        if isinstance(module, NORMS)
    }
    for norm in own:
        norm.forward = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        for norm, forward in own.items():
            del norm.forward
            if forward is not None:
                norm.forward = forward
