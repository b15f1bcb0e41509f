from .adapter import LowRankAdapter, LowRankLinear
from .e3va import E3VASidePath
from .none import NoSidePath

__all__ = ['E3VASidePath', 'LowRankAdapter', 'LowRankLinear', 'NoSidePath']
