"""E3VA-Late: a side path up to the last blocks, a tuner inside these."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.e3va.e3va_mix import E3VAMix, E3VAMixOptions
from e3va_mm.utils.options import Check, option, optional, whole

a_tuner = Check(
    lambda value: isinstance(value, Mapping) and 'type' in value,
    'a dict with a type',
)


@dataclass(frozen=True, kw_only=True)
class E3VALateOptions(E3VAMixOptions):
    """Options of :class:`E3VALate`, beside those of E3VA-Mix.

    Attributes:
        late (int): The number of last blocks that run with a graph. A trunk
            with several resolutions takes whole stages. Defaults to 4.
        inside (Mapping, optional): The tuner in these blocks. Defaults to
            ``dict(type='LoRA')``.
    """

    late: int = option(4, whole())
    inside: Mapping | None = option(None, optional(a_tuner))


@MODELS.register_module()
class E3VALate(E3VAMix):
    r"""E3VA-Mix beside all blocks but the last, a tuner inside the last.

    .. math:: y = B_L(\cdots B_{L-K+1}(x_{L-K} + h_{L-K}))

    with blocks :math:`B` that are tuned from inside, by LoRA or any other
    tuner. The graph goes back through these ``K`` blocks and ends there.
    Outputs before them are those of E3VA-Mix. Not part of the paper.

    Args:
        **options: See :class:`E3VALateOptions`.

    Raises:
        ConfigError: If the trunk cannot be divided there, or ``inside`` is a
            tuner that trains stock parameters.
    """

    OPTIONS = E3VALateOptions

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        late = trunk.leave(self.options.late)
        super().attach(trunk)
        inside = self.options.inside or dict(type='LoRA')
        self.inside = MODELS.build(dict(inside, _scope_='e3va_mm'))
        if not self.inside.HAS_GRAPH or [*self.inside.attach(late)]:
            raise ConfigError(
                '`tuner.inside` should add parameters of its own to blocks, '
                f'such as LoRA or Mona, but got {inside}.'
            )
        return []
