from .base import Band, Downsampling, StageEnd, StageSpec, Trunk
from .layout import Layout
from .options import TrunkOptions
from .swin import SwinTrunk

__all__ = [
    'Band',
    'Downsampling',
    'Layout',
    'StageEnd',
    'StageSpec',
    'SwinTrunk',
    'Trunk',
    'TrunkOptions',
]
