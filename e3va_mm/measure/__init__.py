from .kept import fold_paths, kept_by_module, kept_for_backward
from .live_bytes import CATEGORIES, LiveBytes
from .step import TrainingStep
from .variants import VARIANTS, variant_config

__all__ = [
    'CATEGORIES',
    'LiveBytes',
    'TrainingStep',
    'VARIANTS',
    'fold_paths',
    'kept_by_module',
    'kept_for_backward',
    'variant_config',
]
