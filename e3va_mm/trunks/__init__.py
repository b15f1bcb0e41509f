from e3va_mm.trunks.build import build_trunk
from e3va_mm.trunks.layout import Layout
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.stages import (
    STREAM,
    Band,
    Downsampling,
    Size,
    StageEnd,
    StageSpec,
)
from e3va_mm.trunks.timm_hiera import TimmHiera
from e3va_mm.trunks.timm_vit import DINOv3ViT, TimmViT
from e3va_mm.trunks.trunk import Trunk

__all__ = [
    'Band',
    'DINOv3ViT',
    'Downsampling',
    'Layout',
    'STREAM',
    'Size',
    'StageEnd',
    'StageSpec',
    'TimmHiera',
    'TimmViT',
    'Trunk',
    'TrunkOptions',
    'build_trunk',
]
