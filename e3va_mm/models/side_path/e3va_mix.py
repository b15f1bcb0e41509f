"""E3VA-Mix: E3VA with a mixer at every stage's end."""

from collections.abc import Sequence

from torch import Tensor, nn

from ...errors import ConfigError
from ...registry import MODELS
from ...utils import is_whole
from ..trunks import StageSpec
from ..trunks.base import Size
from .e3va import E3VASidePath
from .highway import Highway
from .stage_mixer import StageMixer, mix


@MODELS.register_module()
class E3VAMixSidePath(E3VASidePath):
    r"""E3VA whose highway reads itself, the trunk and its surroundings.

    .. math:: h_i \leftarrow h_i + M_i(x_i + h_i)

    at the end of stage ``i``, with the mixer ``M``
    (:class:`~e3va_mm.models.side_path.stage_mixer.StageMixer`), before the
    output and the next stage read it. All else is E3VA's. Not part of the
    paper.

    Args:
        stages (Sequence[StageSpec]): As for :class:`E3VASidePath`.
        width (int): Channels inside a mixer. Defaults to 64.
        mixers (int): Mixers at a stage's end, one behind the other. Defaults
            to 1.

    The remaining arguments are those of :class:`E3VASidePath`.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *args,
        width: int = 64,
        mixers: int = 1,
        **kwargs,
    ) -> None:
        super().__init__(stages, *args, **kwargs)
        for name, value in dict(width=width, mixers=mixers).items():
            if not is_whole(value):
                raise ConfigError(
                    f'`side_path.{name}` should be a whole number above zero, '
                    f'but got {value!r}.'
                )
        self.mixers = nn.ModuleList(
            nn.ModuleList(
                StageMixer(spec.channels, width) for _ in range(mixers)
            )
            for spec in stages
        )

    def output(self, highway: Highway, trunk: Tensor, size: Size) -> Tensor:
        """See :class:`E3VASidePath`."""
        for mixer in self.mixers[highway.stage]:
            state = super().output(highway, trunk, size)
            codec = self.codec_of_sums(highway.stage)
            highway.add_to_sum(mix(mixer, state, size, codec, self.compute))
        return super().output(highway, trunk, size)
