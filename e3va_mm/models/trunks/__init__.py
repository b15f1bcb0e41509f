from .base import StageOutput, StageSpec, Trunk
from .swin import SwinTrunk

__all__ = ['StageOutput', 'StageSpec', 'SwinTrunk', 'Trunk']
