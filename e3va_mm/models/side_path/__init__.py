from .adapter import LowRankAdapter, LowRankLinear
from .e3va import E3VASidePath

__all__ = ['E3VASidePath', 'LowRankAdapter', 'LowRankLinear']
