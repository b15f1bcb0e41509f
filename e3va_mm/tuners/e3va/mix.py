"""E3VA-Mix: E3VA with a mixer at every stage's end."""

from collections.abc import Sequence

from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import StageSpec
from e3va_mm.trunks.base import Size
from e3va_mm.tuners.e3va.highway import Highway
from e3va_mm.tuners.e3va.mixer import StageMixer, mix
from e3va_mm.tuners.e3va.side_path import E3VASidePath
from e3va_mm.utils import is_whole


@MODELS.register_module()
class E3VAMixSidePath(E3VASidePath):
    r"""E3VA whose highway reads itself, the trunk and its surroundings.

    .. math:: h_i \leftarrow h_i + M_i(x_i + h_i)

    at the end of stage ``i``, with the mixer ``M``
    (:class:`~e3va_mm.tuners.e3va.mixer.StageMixer`), before the
    output and the next stage read it. Beside mixers, adapters of one tap of a
    block do as well as of all. The rest is E3VA's. Not part of the paper.

    Args:
        stages (Sequence[StageSpec]): As for :class:`E3VASidePath`.
        width (int): Channels inside a mixer. Defaults to 256.
        taps (Sequence[str], optional): The taps of a block to read. Defaults
            to its last.

    The remaining arguments are those of :class:`E3VASidePath`.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        width: int = 256,
        taps: Sequence[str] | None = None,
        **kwargs,
    ) -> None:
        if taps is None:
            taps = stages[0].taps[-1:]
        super().__init__(stages, taps=taps, **kwargs)
        if not is_whole(width):
            raise ConfigError(
                '`side_path.width` should be a whole number above zero, but '
                f'got {width!r}.'
            )
        self.mixers = nn.ModuleList(
            StageMixer(spec.channels, width) for spec in stages
        )

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`E3VASidePath`."""
        state = super().output(highway, trunk, size)
        mixer = self.mixers[highway.stage]
        codec = self.codec_of_sums(highway.stage)
        highway.add_to_sum(mix(mixer, state, size, codec, self.compute))
        return super().output(highway, trunk, size)
