from .adapter import LowRankAdapter, LowRankLinear
from .e3va import E3VASidePath
from .e3va_mix import E3VAMixSidePath
from .none import NoSidePath

__all__ = [
    'E3VAMixSidePath',
    'E3VASidePath',
    'LowRankAdapter',
    'LowRankLinear',
    'NoSidePath',
]
