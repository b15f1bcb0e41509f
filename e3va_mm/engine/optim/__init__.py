from .side_path_constructor import SidePathOptimWrapperConstructor

__all__ = ['SidePathOptimWrapperConstructor']
