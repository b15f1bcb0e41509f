from .e3va_swin import E3VASwinTransformer
from .side_path_backbone import SidePathBackbone

__all__ = ['E3VASwinTransformer', 'SidePathBackbone']
