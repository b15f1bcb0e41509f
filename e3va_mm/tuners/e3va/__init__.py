from e3va_mm.tuners.e3va.adapter import AdapterBank
from e3va_mm.tuners.e3va.e3va_fusion import E3VAFusion, E3VAFusionOptions
from e3va_mm.tuners.e3va.e3va_mix import E3VAMix, E3VAMixOptions
from e3va_mm.tuners.e3va.no_side_path import NoSidePath
from e3va_mm.tuners.e3va.side_path import (
    E3VA,
    E3VAOptions,
    SidePath,
    SidePathOptions,
)

__all__ = [
    'AdapterBank',
    'E3VA',
    'E3VAFusion',
    'E3VAFusionOptions',
    'E3VAMix',
    'E3VAMixOptions',
    'E3VAOptions',
    'NoSidePath',
    'SidePath',
    'SidePathOptions',
]
