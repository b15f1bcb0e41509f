"""What a better E3VA could be made of: candidates of the ablation.

They are for accuracy alone: plain autograd keeps all that they compute. What
has earned its cost is part of the package, in its own form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_mm.registry import MODELS
from e3va_mm.tuners import E3VA, E3VAMix, E3VAMixOptions, E3VAOptions
from e3va_mm.tuners.e3va.adapter import AdapterBank
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.mixer import StageMixer
from e3va_mm.tuners.token_grid import on_grid
from e3va_mm.utils.options import flag, option


class CandidateAdapters(AdapterBank):
    """Adapters with what the paper's do not have.

    Args:
        names (Sequence[str]): See :class:`AdapterBank`.
        channels (int): Channels of the taps.
        rank (int): Inner rank.
        bottleneck_ratio (float): Bottleneck relative to the channels.
        kernel_size (int, optional): Width of a depth-wise convolution of the
            projections ``x P1`` over the token grid, which adds to them.
        scale (bool): Whether scales of the whole, at first 1, are learned.
        norm (bool): Whether tokens are standardised over their channels.
        std (float, optional): Deviation of all factors but the last at first.
    """

    def __init__(
        self,
        names: Sequence[str],
        channels: int,
        rank: int,
        bottleneck_ratio: float,
        kernel_size: int | None,
        scale: bool,
        norm: bool,
        std: float | None,
    ) -> None:
        super().__init__(names, channels, rank, bottleneck_ratio)
        self.norm = norm
        self.filters = self.scale = None
        if kernel_size:
            self.filters = nn.ModuleList(
                nn.Conv2d(rank, rank, kernel_size, padding='same', groups=rank)
                for _ in names
            )
        if scale:
            self.scale = nn.Parameter(torch.ones(len(names)))
        if std is not None:
            for factor in (self.down.p, self.down.q, self.up.p):
                nn.init.normal_(factor, std=std)

    def one(self, index: int, x: Tensor, size: tuple[int, int]) -> Tensor:
        """An adapter: (B, L, C) of a grid (H, W) -> (B, L, C)."""
        if self.norm:
            x = F.layer_norm(x, x.shape[-1:])
        down, up = self.down, self.up
        z = x @ down.p[index]
        if self.filters is not None:
            z = z + on_grid(z, size, self.filters[index])
        inner = F.gelu(z @ down.q[index] + down.bias[index])
        added = inner @ up.p[index] @ up.q[index] + up.bias[index]
        return added if self.scale is None else added * self.scale[index]


class HoldsTaps:
    """Holds the taps of a stage until its end, where more is known."""

    def start(self, *args) -> Highway:
        """See :class:`E3VA`."""
        highway = super().start(*args)
        highway.taps = []
        return highway

    def add_tap(self, highway, *tap) -> None:
        """See :class:`E3VA`."""
        highway.taps.append(tap)

    def held(self, highway, trunk) -> Iterator[tuple]:
        """Give stage, block, name, the tap, and the stream behind it."""
        # What the stage began with; all branches add to it.
        stream = trunk - sum(value for *_, value in highway.taps)
        for *place, value in highway.taps:
            stream = stream + value
            yield *place, value, stream
        highway.taps = []


@dataclass(frozen=True, kw_only=True)
class CandidateOptions(E3VAOptions):
    """Options of :class:`CandidateE3VA`, beside those of E3VA.

    Attributes:
        kernel_size (int, optional): See :class:`CandidateAdapters`.
        tap_scale (bool): Its ``scale``.
        norm_taps (bool): Its ``norm``.
        std (float, optional): Its ``std``.
        state (bool): Whether adapters read the highway beside their tap, one
            after the other.
        after_residual (bool): Whether they read the trunk's stream behind the
            residual addition instead of the branch before it.
    """

    kernel_size: int | None = option(None)
    tap_scale: bool = option(False, flag)
    norm_taps: bool = option(False, flag)
    std: float | None = option(None)
    state: bool = option(False, flag)
    after_residual: bool = option(False, flag)


@MODELS.register_module()
class CandidateE3VA(HoldsTaps, E3VA):
    """E3VA with one or several candidates.

    Args:
        **options: See :class:`CandidateOptions`.
    """

    OPTIONS = CandidateOptions

    def build(self, stages) -> 'CandidateE3VA':
        """See :class:`E3VA`."""
        super().build(stages)
        own = self.options
        self.stages = nn.ModuleList(
            CandidateAdapters(
                bank.names,
                spec.channels,
                own.rank,
                own.bottleneck_ratio,
                own.kernel_size,
                own.tap_scale,
                own.norm_taps,
                own.std,
            )
            for spec, bank in zip(stages, self.stages, strict=True)
        )
        return self

    def output(self, highway, trunk, size) -> Tensor:
        """See :class:`E3VA`."""
        for stage, block, tap, value, stream in self.held(highway, trunk):
            read = stream if self.options.after_residual else value
            state = highway.sum()
            if self.options.state and state is not None:
                read = read + state
            index = self.stages[stage].names.index(f'{block}.{tap}')
            highway.add_to_sum(self.stages[stage].one(index, read, size))
        return super().output(highway, trunk, size)


class MixersInARow(nn.ModuleList):
    """Mixers, each of which reads what the one before has made."""

    def forward(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        """As :class:`StageMixer`."""
        mixed = state
        for mixer in self:
            mixed = mixed + mixer(mixed, size)
        return mixed - state


@dataclass(frozen=True, kw_only=True)
class CandidateMixOptions(E3VAMixOptions):
    """Options of :class:`CandidateMix`, beside those of E3VA-Mix.

    Attributes:
        mixers (int): Mixers at a stage's end, one behind the other.
        adapters (bool): Whether there are adapters at all.
        after_residual (bool): As of :class:`CandidateOptions`, for all taps.
    """

    mixers: int = option(1)
    adapters: bool = option(True, flag)
    after_residual: bool = option(False, flag)


@MODELS.register_module()
class CandidateMix(HoldsTaps, E3VAMix):
    """E3VA-Mix with one or several candidates.

    Args:
        **options: See :class:`CandidateMixOptions`.
    """

    OPTIONS = CandidateMixOptions

    def build(self, stages) -> 'CandidateMix':
        """See :class:`E3VAMix`."""
        super().build(stages)
        self.mixers = nn.ModuleList(
            MixersInARow(
                StageMixer(spec.channels, self.options.width)
                for _ in range(self.options.mixers)
            )
            for spec in stages
        )
        if not self.options.adapters:
            del self.stages
        return self

    def start(self, stage, *args) -> Highway:
        """See :class:`E3VA`."""
        if self.options.adapters:
            return super().start(stage, *args)
        highway = Highway(None, args[0], self.codecs[stage], stage=stage)
        highway.taps = []
        return highway

    def output(self, highway, trunk, size) -> Tensor:
        """See :class:`E3VA`."""
        for *place, value, stream in self.held(highway, trunk):
            if self.options.adapters:
                read = stream if self.options.after_residual else value
                E3VAMix.add_tap(self, highway, *place, read)
        return super().output(highway, trunk, size)


def _candidate(**options) -> dict:
    return dict(type='e3va_mm.CandidateE3VA', **options)


def _mix(width=256, taps=('attn', 'ffn'), **options) -> dict:
    kind = dict(type='e3va_mm.CandidateMix', width=width, taps=list(taps))
    return dict(kind, **options)


# Changes of E3VA, then of E3VA with mixers.
CANDIDATES = {
    'after-residual': _candidate(after_residual=True),
    'linear-downsampling': dict(downsampling='linear'),
    'normal-0.02': _candidate(std=0.02),
    'kernel-3': _candidate(kernel_size=3),
    'tap-scale': _candidate(tap_scale=True),
    'norm-taps': _candidate(norm_taps=True),
    'late-rank': dict(rank=[8, 16, 32, 64]),
    'state': _candidate(state=True),
    'mix-64': _mix(width=64),
    'mix-64-in-a-row-3': _mix(width=64, mixers=3),
    'mix-128': _mix(width=128),
    'mix-256': _mix(),
    'mix-256-linear-downsampling': _mix(downsampling='linear'),
    'mix-256-after-residual': _mix(after_residual=True),
    'mix-256-attn': _mix(taps=['attn']),
    'mix-256-ffn': _mix(taps=['ffn']),
    'mix-256-no-adapters': _mix(adapters=False),
}
