from .live_bytes import LiveBytes
from .step import TrainingStep
from .variants import VARIANTS, variant_config

__all__ = ['LiveBytes', 'TrainingStep', 'VARIANTS', 'variant_config']
