from e3va_mm.backbones.faces import (
    E3VABackbone,
    E3VASwinTransformer,
    E3VAVisionTransformer,
    tuned_config,
)
from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.backbones.trunk_pool import TrunkPool
from e3va_mm.backbones.tuned import TunedBackbone, tune

__all__ = [
    'E3VABackbone',
    'E3VASwinTransformer',
    'E3VAVisionTransformer',
    'TrunkPool',
    'TunedBackbone',
    'run_trunk',
    'tune',
    'tuned_config',
]
