from e3va_mm.tuners.e3va.adapter import LowRankAdapter, LowRankLinear
from e3va_mm.tuners.e3va.mix import E3VAMixSidePath
from e3va_mm.tuners.e3va.none import NoSidePath
from e3va_mm.tuners.e3va.side_path import E3VASidePath

__all__ = [
    'E3VAMixSidePath',
    'E3VASidePath',
    'LowRankAdapter',
    'LowRankLinear',
    'NoSidePath',
]
