from .base import Band, Downsampling, StageEnd, StageSpec, Trunk
from .options import TrunkOptions
from .swin import SwinTrunk

__all__ = [
    'Band',
    'Downsampling',
    'StageEnd',
    'StageSpec',
    'SwinTrunk',
    'Trunk',
    'TrunkOptions',
]
