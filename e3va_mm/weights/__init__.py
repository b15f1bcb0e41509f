from e3va_mm.weights.adapter_extraction import (
    adapter_of,
    check_adapter,
    trunk_records,
    without_trunks,
)
from e3va_mm.weights.adapter_file import AdapterFile, TrunkRecord
from e3va_mm.weights.class_names import describe_class, to_class_names
from e3va_mm.weights.fingerprint import fingerprint
from e3va_mm.weights.matching import match_state
from e3va_mm.weights.reading import read_adapter, read_checkpoint
from e3va_mm.weights.source_weights import SourceWeights
from e3va_mm.weights.state_dicts import to_stock_state
from e3va_mm.weights.swin_names import describe_swin, to_stock_keys
from e3va_mm.weights.vit_names import VIT_TARGETS, describe_vit, to_vit_keys

__all__ = [
    'AdapterFile',
    'SourceWeights',
    'TrunkRecord',
    'VIT_TARGETS',
    'adapter_of',
    'check_adapter',
    'describe_class',
    'describe_swin',
    'describe_vit',
    'fingerprint',
    'match_state',
    'read_adapter',
    'read_checkpoint',
    'to_class_names',
    'to_stock_keys',
    'to_stock_state',
    'to_vit_keys',
    'trunk_records',
    'without_trunks',
]
