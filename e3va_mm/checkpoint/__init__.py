from ..utils.torchvision import declare_missing_ops
from .loaders import read_checkpoint, register_safe_loaders
from .matching import LoadReport, match_state
from .source_weights import SourceWeights
from .stock_state import to_stock_state
from .swin_keys import describe_swin, to_stock_keys
from .vit_keys import VIT_TARGETS, describe_vit, to_vit_keys

__all__ = [
    'LoadReport',
    'SourceWeights',
    'VIT_TARGETS',
    'describe_swin',
    'describe_vit',
    'match_state',
    'read_checkpoint',
    'register_safe_loaders',
    'to_stock_keys',
    'to_stock_state',
    'to_vit_keys',
]

register_safe_loaders()
# What configs import first, with the frameworks' own tools too.
declare_missing_ops()
