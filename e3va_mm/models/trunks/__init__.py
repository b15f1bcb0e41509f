from .base import Downsampling, StageOutput, StageSpec, Trunk
from .options import TrunkOptions
from .swin import SwinTrunk

__all__ = [
    'Downsampling',
    'StageOutput',
    'StageSpec',
    'SwinTrunk',
    'Trunk',
    'TrunkOptions',
]
