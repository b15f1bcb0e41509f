from e3va_mm.frameworks.torchvision import declare_missing_ops
from e3va_mm.weights.adapter_file import (
    AdapterFile,
    TrunkRecord,
    adapter_of,
    fingerprint,
    trunk_records,
)
from e3va_mm.weights.loaders import read_checkpoint, register_safe_loaders
from e3va_mm.weights.matching import LoadReport, match_state
from e3va_mm.weights.reading import read_adapter
from e3va_mm.weights.source_weights import SourceWeights
from e3va_mm.weights.stock_state import to_stock_state
from e3va_mm.weights.swin_names import describe_swin, to_stock_keys
from e3va_mm.weights.vit_names import VIT_TARGETS, describe_vit, to_vit_keys

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
