from e3va_mm.backbones.e3va_backbone import E3VABackbone
from e3va_mm.backbones.e3va_swin import E3VASwinTransformer
from e3va_mm.backbones.e3va_vit import E3VAVisionTransformer
from e3va_mm.backbones.petl_backbone import PETLBackbone
from e3va_mm.backbones.petl_swin import PETLSwinTransformer
from e3va_mm.backbones.side_path_backbone import SidePathBackbone

__all__ = [
    'E3VABackbone',
    'E3VASwinTransformer',
    'E3VAVisionTransformer',
    'PETLBackbone',
    'PETLSwinTransformer',
    'SidePathBackbone',
]
