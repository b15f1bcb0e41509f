# Importing the engine here puts the optimizer constructor and the safe
# checkpoint door in force wherever one of our models is built.
from .. import checkpoint  # noqa: F401
from ..engine import optim  # noqa: F401
from .backbones import (
    E3VABackbone,
    E3VASwinTransformer,
    E3VAVisionTransformer,
    SidePathBackbone,
)
from .multi_task import MultiTaskModel
from .necks import SimpleFeaturePyramid
from .side_path import E3VASidePath, LowRankAdapter, NoSidePath

__all__ = [
    'E3VABackbone',
    'E3VASidePath',
    'E3VASwinTransformer',
    'E3VAVisionTransformer',
    'LowRankAdapter',
    'MultiTaskModel',
    'NoSidePath',
    'SidePathBackbone',
    'SimpleFeaturePyramid',
]
