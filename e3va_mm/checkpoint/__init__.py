from ..utils.torchvision import declare_missing_ops
from .adapter_file import (
    AdapterFile,
    TrunkRecord,
    adapter_of,
    fingerprint,
    trunk_records,
)
from .loaders import read_checkpoint, register_safe_loaders
from .matching import LoadReport, match_state
from .reading import read_adapter
from .source_weights import SourceWeights
from .stock_state import to_stock_state
from .swin_keys import describe_swin, to_stock_keys
from .vit_keys import VIT_TARGETS, describe_vit, to_vit_keys

__all__ = [
    'AdapterFile',
    'LoadReport',
    'SourceWeights',
    'TrunkRecord',
    'VIT_TARGETS',
    'adapter_of',
    'describe_swin',
    'describe_vit',
    'fingerprint',
    'match_state',
    'read_adapter',
    'read_checkpoint',
    'register_safe_loaders',
    'to_stock_keys',
    'to_stock_state',
    'to_vit_keys',
    'trunk_records',
]

register_safe_loaders()
# What configs import first, with the frameworks' own tools too.
declare_missing_ops()
