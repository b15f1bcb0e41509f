"""What the registry of models finds in e3va_mm, for configs of both styles."""

from e3va_mm.backbones import (
    E3VABackbone,
    E3VASwinTransformer,
    E3VAVisionTransformer,
    TunedBackbone,
)
from e3va_mm.multi_task import MultiTaskModel
from e3va_mm.necks import SimpleFeaturePyramid
from e3va_mm.trunks import DINOv3ViT, TimmViT
from e3va_mm.tuners import (
    DTL,
    E3VA,
    LST,
    Adapter,
    AdaptFormer,
    AdaTAD,
    BitFit,
    E3VAMix,
    Frozen,
    Full,
    LoRA,
    LoRand,
    LoSA,
    Mona,
    NormTuning,
    NoSidePath,
    Partial,
    R2Tuning,
    ResTuning,
)

__all__ = [
    'AdaTAD',
    'DTL',
    'LST',
    'LoSA',
    'R2Tuning',
    'ResTuning',
    'AdaptFormer',
    'Adapter',
    'BitFit',
    'DINOv3ViT',
    'E3VA',
    'E3VABackbone',
    'E3VAMix',
    'E3VASwinTransformer',
    'E3VAVisionTransformer',
    'Frozen',
    'Full',
    'LoRA',
    'LoRand',
    'Mona',
    'MultiTaskModel',
    'NoSidePath',
    'NormTuning',
    'Partial',
    'SimpleFeaturePyramid',
    'TimmViT',
    'TunedBackbone',
]
