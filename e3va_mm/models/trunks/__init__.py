from .base import Band, Downsampling, StageOutput, StageSpec, Trunk
from .options import TrunkOptions
from .swin import SwinTrunk

__all__ = [
    'Band',
    'Downsampling',
    'StageOutput',
    'StageSpec',
    'SwinTrunk',
    'Trunk',
    'TrunkOptions',
]
