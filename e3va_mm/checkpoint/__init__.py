from .loaders import read_checkpoint, register_safe_loaders
from .matching import LoadReport, match_state
from .source_weights import SourceWeights
from .swin_keys import describe_swin, to_stock_keys

__all__ = [
    'LoadReport',
    'SourceWeights',
    'describe_swin',
    'match_state',
    'read_checkpoint',
    'register_safe_loaders',
    'to_stock_keys',
]

register_safe_loaders()
