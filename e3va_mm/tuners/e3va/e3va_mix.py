"""E3VA-Mix: E3VA with a mixer at every stage's end."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from e3va_mm.registry import MODELS
from e3va_mm.trunks import Size, StageSpec, Trunk
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.mixer import StageMixer, mix
from e3va_mm.tuners.e3va.side_path import E3VA, E3VAOptions
from e3va_mm.utils.options import option, optional, whole


@dataclass(frozen=True, kw_only=True)
class E3VAMixOptions(E3VAOptions):
    """Options of :class:`E3VAMix`, beside those of E3VA.

    By default it reads the last tap of a block alone.

    Attributes:
        width (int): Channels inside a mixer. Defaults to 256.
        mix_every (int, optional): On a trunk of one resolution, also mix
            behind every so many blocks. Defaults to outputs alone.
    """

    width: int = option(256, whole())
    mix_every: int | None = option(None, optional(whole()))


@MODELS.register_module(name=['E3VAMix', 'E3VAMixSidePath'])
class E3VAMix(E3VA):
    r"""E3VA whose highway reads itself, the trunk and its surroundings.

    .. math:: h_i \leftarrow h_i + M_i(x_i + h_i)

    at the end of stage ``i``, with the mixer ``M``
    (:class:`~e3va_mm.tuners.e3va.mixer.StageMixer`), before the output and
    the next stage read it. Beside mixers, adapters of one tap of a block do as
    well as of all. The rest is E3VA's. Not part of the paper.

    Args:
        **options: See :class:`E3VAMixOptions`.
    """

    OPTIONS = E3VAMixOptions

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        if self.options.mix_every is not None:
            trunk.divide(self.options.mix_every)
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'E3VAMix':
        """Make the adapters and mixers of some stages."""
        super().build(stages)
        self.mixers = nn.ModuleList(
            StageMixer(spec.channels, self.options.width) for spec in stages
        )
        return self

    def _default_taps(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        return offered[-1:]

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        state = super().output(highway, trunk, size)
        mixer = self.mixers[highway.stage]
        codec = self.codec_of_sums(highway.stage)
        highway.add_to_sum(mix(mixer, state, size, codec, self.compute))
        return super().output(highway, trunk, size)
