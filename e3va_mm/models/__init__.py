# Importing the engine here puts the optimizer constructor and the safe
# checkpoint door in force wherever one of our models is built.
from .. import checkpoint  # noqa: F401
from ..engine import optim  # noqa: F401
from .backbones import (
    E3VABackbone,
    E3VASwinTransformer,
    E3VAVisionTransformer,
    PETLBackbone,
    PETLSwinTransformer,
    SidePathBackbone,
)
from .multi_task import MultiTaskModel
from .necks import SimpleFeaturePyramid
from .petl import (
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
from .side_path import (
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
