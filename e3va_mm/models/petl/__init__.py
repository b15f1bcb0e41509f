from .adapter import Adapter
from .adaptformer import AdaptFormer
from .bitfit import BitFit
from .fixed import Fixed
from .full import Full
from .lora import LoRA
from .lorand import LoRand
from .method import PETLMethod
from .mona import Mona
from .norm_tuning import NormTuning
from .partial import Partial

__all__ = [
    'AdaptFormer',
    'Adapter',
    'BitFit',
    'Fixed',
    'Full',
    'LoRA',
    'LoRand',
    'Mona',
    'NormTuning',
    'PETLMethod',
    'Partial',
]
