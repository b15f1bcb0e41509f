from e3va_mm.engine.optim.layer_decay import cover_layer_decay
from e3va_mm.engine.optim.side_path_constructor import (
    SidePathOptimWrapperConstructor,
)

__all__ = ['SidePathOptimWrapperConstructor', 'cover_layer_decay']
