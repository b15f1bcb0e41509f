"""One pass of a frozen trunk, for as many side paths as want it.

What a trunk computes does not depend on any side path, so that backbones
tuned apart can share it (``share_trunk`` of the backbones).
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from e3va_mm.backbones.stock_pass import run_stock
from e3va_mm.numerics.autocast import autocast_dtype, autocast_to
from e3va_mm.trunks import StageEnd, Trunk
from e3va_mm.trunks.trunk import plain_attributes
from e3va_mm.tuners.e3va.replay import OnStageTap, Replay, RunTrunk


def run_trunk(
    backbones: Sequence[nn.Module],
    image: Tensor,
    rows: Sequence[slice] | None = None,
) -> list[tuple[Tensor, ...]]:
    """Run a trunk once and the side paths of several backbones beside it.

    Args:
        backbones (Sequence[TunedBackbone]): At least one; all of the same
            trunk.
        image (Tensor): (B, 3, H, W).
        rows (Sequence[slice], optional): Which of the B images are a
            backbone's. Defaults to all for each.

    Returns:
        list[tuple[Tensor, ...]]: Of each backbone what its ``forward`` gives
        for its images.

    Raises:
        ConfigError: If one trains and its trunk has received no weights.
    """
    first = backbones[0]
    for backbone in backbones:
        backbone.require_weights()
    parts = rows or [None] * len(backbones)
    if not all(backbone.tuner.enabled for backbone in backbones):
        return _run_apart(backbones, image, parts)
    ends = [_ends(backbone) for backbone in backbones]
    every = sorted(set().union(*ends))
    trunk = first.trunk
    if every != ends[0]:
        # Plain trunks end a stage with each output, each backbone its own.
        trunk = trunk.with_stages(every)
    passes = [
        _SidePass(backbone, image, own, every, part)
        for backbone, own, part in zip(backbones, ends, parts, strict=True)
    ]

    def on_tap(stage: int, block: int, tap: str, value: Tensor) -> None:
        for each in passes:
            each.on_tap(stage, block, tap, value)

    def on_end(stage: int, end: StageEnd) -> None:
        for each in passes:
            each.on_end(stage, end)

    taps = dict.fromkeys(t for b in backbones for t in b.tuner.taps)
    last = len(every) - 1
    with torch.no_grad():
        _run_of(first, trunk)(image, last, tuple(taps), on_tap, on_end)
    return [each.finish() for each in passes]


def _run_apart(
    backbones: Sequence[nn.Module],
    image: Tensor,
    parts: Sequence[slice | None],
) -> list[tuple[Tensor, ...]]:
    """The same where some are switched off: each of these by itself."""
    on = [each for each in backbones if each.tuner.enabled]
    own = [p for each, p in zip(backbones, parts, strict=True) if each in on]
    shared = iter(run_trunk(on, image, own) if on else [])
    return [
        next(shared)
        if each.tuner.enabled
        else run_stock(each, image if part is None else image[part])
        for each, part in zip(backbones, parts, strict=True)
    ]


def trunk_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first thing in which two backbones' trunks differ, if any.

    Weights are left out. So is what outputs do not depend on: drop path
    rates, checkpointing, chunks.
    """
    ours, theirs = trunk_facts(one), trunk_facts(other)
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            return (
                f'{name} is {ours.get(name)} in one and {theirs.get(name)} in '
                'the other'
            )
    return None


def trunk_facts(backbone: nn.Module) -> dict[str, object]:
    """What a trunk computes with, by names: all but the weights' values."""
    trunk = backbone.trunk
    found = {
        'the class': trunk.stock_class.__name__,
        'the layout': trunk.layout,
        'the number of blocks': _ends(backbone)[-1],
        'trunk_compute': trunk.options.compute,
        'trunk_weights': trunk.options.weights,
        **trunk.settings,
    }
    for name, child in backbone.trunk_children():
        for path, module in child.named_modules(prefix=name):
            if isinstance(module, (DropPath, nn.Dropout, nn.Identity)):
                continue  # does nothing here
            found[path] = type(module).__name__
            plain = plain_attributes(module)
            found |= {f'{path}.{key}': value for key, value in plain.items()}
    own = backbone.trunk_part(backbone.state_dict())
    return found | {key: tuple(value.shape) for key, value in own.items()}


def _ends(backbone: nn.Module) -> list[int]:
    """The number of blocks up to the end of each stage."""
    specs = backbone.trunk.stages()
    return list(accumulate(spec.depth for spec in specs))


class _SidePass:
    """What one side path makes of a pass of the trunk.

    Args:
        backbone (TunedBackbone): Whose side path it is.
        image (Tensor): (B, 3, H, W).
        ends (Sequence[int]): The blocks up to the end of each of its stages.
        every (Sequence[int]): The same of the pass, whose stages may be finer.
        rows (slice, optional): Which of the images are its own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image: Tensor,
        ends: Sequence[int],
        every: Sequence[int],
        rows: slice | None,
    ) -> None:
        self.backbone = backbone
        self._rows = rows
        self.outputs: list[Tensor] = []
        self._last = len(ends) - 1
        # Of each stage of the pass: our stage, the blocks of it before, and
        # whether ours ends there too.
        self._places = []
        for begin, end in zip([0, *every], every, strict=False):
            stage = next(i for i, own in enumerate(ends) if end <= own)
            begins = ends[stage - 1] if stage else 0
            self._places.append((stage, begin - begins, end == ends[stage]))
        # The pass itself runs without.
        self._graph = torch.is_grad_enabled()
        self._replay = Replay(self._own(image), _runner(backbone, image))
        self._highway = backbone.tuner.start(0, None, self._replay)

    def _own(self, value: Tensor) -> Tensor:
        return value if self._rows is None else value[self._rows]

    def on_tap(self, stage: int, block: int, tap: str, value: Tensor) -> None:
        """Add what a tap (B, L, C) contributes."""
        side_path = self.backbone.tuner
        if tap not in side_path.taps:
            return
        stage, before, _ = self._places[stage]
        with torch.set_grad_enabled(self._graph):
            side_path.add_tap(
                self._highway, stage, before + block, tap, self._own(value)
            )

    def on_end(self, stage: int, end: StageEnd) -> None:
        """Give the output of a stage; carry the highway to the next."""
        stage, _, ends = self._places[stage]
        if not ends:
            return
        backbone, side_path = self.backbone, self.backbone.tuner
        trunk = backbone.trunk
        end = end._replace(tokens=self._own(end.tokens))
        with torch.set_grad_enabled(self._graph):
            total = side_path.output(self._highway, end.tokens, end.size)
            kept = None
            if stage in trunk.out_stages:
                output, kept = backbone.output(stage, total, end)
                self.outputs.append(output)
            if stage == self._last:
                return
            inherited = None
            if trunk.highway_goes_on:
                inherited = side_path.inherit(
                    self._highway,
                    total,
                    end.tokens,
                    trunk.downsampling(stage, end.size),
                    kept,
                )
            self._highway = side_path.start(stage + 1, inherited, self._replay)

    def finish(self) -> tuple[Tensor, ...]:
        """The outputs, and nothing held that no graph needs."""
        self._replay.image = None
        return tuple(self.outputs)


def _runner(backbone: nn.Module, image: Tensor) -> RunTrunk:
    """What runs the trunk again, under the autocast of now."""
    dtype = autocast_dtype(image)

    @torch.no_grad()
    def run(
        image: Tensor,
        last: int,
        wanted: Collection[int],
        on_tap: OnStageTap,
    ) -> None:
        def on_any_tap(
            stage: int, block: int, tap: str, value: Tensor
        ) -> None:
            if stage in wanted:
                on_tap(stage, value)

        with autocast_to(image, dtype):
            run_here = _run_of(backbone, backbone.trunk)
            run_here(image, last, backbone.tuner.taps, on_any_tap)

    return run


def _run_of(backbone: nn.Module, trunk: Trunk) -> Callable[..., None]:
    """``trunk.run``, or what reads it from disk while training."""
    cache = backbone.trunk_cache
    if cache is None or not backbone.training or not cache.is_open:
        return trunk.run
    return partial(cache.run, trunk)
