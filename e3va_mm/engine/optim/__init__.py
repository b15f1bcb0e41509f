from .layer_decay import cover_layer_decay
from .side_path_constructor import SidePathOptimWrapperConstructor

__all__ = ['SidePathOptimWrapperConstructor', 'cover_layer_decay']
