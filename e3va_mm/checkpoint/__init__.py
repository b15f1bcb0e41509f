from .loaders import read_checkpoint, register_safe_loaders
from .matching import LoadReport, match_state
from .swin_keys import describe_swin, to_stock_keys

__all__ = [
    'LoadReport',
    'describe_swin',
    'match_state',
    'read_checkpoint',
    'register_safe_loaders',
    'to_stock_keys',
]

register_safe_loaders()
