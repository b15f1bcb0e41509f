from e3va_mm.measure.gpu_model import CARDS, Launches, count_launches
from e3va_mm.measure.kept import fold_paths, kept_for_backward
from e3va_mm.measure.live_bytes import CATEGORIES, LiveBytes
from e3va_mm.measure.step import TrainingStep
from e3va_mm.measure.variants import VARIANTS, variant_config

__all__ = [
    'CARDS',
    'CATEGORIES',
    'Launches',
    'LiveBytes',
    'TrainingStep',
    'VARIANTS',
    'count_launches',
    'fold_paths',
    'kept_for_backward',
    'variant_config',
]
