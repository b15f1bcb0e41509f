from e3va_mm.trunks.base import Band, Downsampling, StageEnd, StageSpec, Trunk
from e3va_mm.trunks.layout import Layout
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.swin import SwinTrunk

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
