# Importing the engine here puts the optimizer constructor and the safe
# checkpoint door in force wherever one of our models is built.
from e3va_mm import checkpoint  # noqa: F401
from e3va_mm.backbones import (
    E3VABackbone,
    E3VASwinTransformer,
    E3VAVisionTransformer,
    PETLBackbone,
    PETLSwinTransformer,
    SidePathBackbone,
)
from e3va_mm.engine import optim  # noqa: F401
from e3va_mm.multi_task import MultiTaskModel
from e3va_mm.necks import SimpleFeaturePyramid
from e3va_mm.tuners import (
    Adapter,
    AdaptFormer,
    BitFit,
    Fixed,
    Full,
    LoRA,
    LoRand,
    Mona,
    NormTuning,
    Partial,
)
from e3va_mm.tuners.e3va import (
    E3VAMixSidePath,
    E3VASidePath,
    LowRankAdapter,
    NoSidePath,
)

__all__ = [
    'AdaptFormer',
    'Adapter',
    'BitFit',
    'E3VABackbone',
    'E3VAMixSidePath',
    'E3VASidePath',
    'E3VASwinTransformer',
    'E3VAVisionTransformer',
    'Fixed',
    'Full',
    'LoRA',
    'LoRand',
    'LowRankAdapter',
    'Mona',
    'MultiTaskModel',
    'NoSidePath',
    'NormTuning',
    'PETLBackbone',
    'PETLSwinTransformer',
    'Partial',
    'SidePathBackbone',
    'SimpleFeaturePyramid',
]
