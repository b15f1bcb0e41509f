from e3va_mm.tuners.adapter import Adapter
from e3va_mm.tuners.adaptformer import AdaptFormer
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.bitfit import BitFit
from e3va_mm.tuners.frozen import Fixed
from e3va_mm.tuners.full import Full
from e3va_mm.tuners.lora import LoRA
from e3va_mm.tuners.lorand import LoRand
from e3va_mm.tuners.mona import Mona
from e3va_mm.tuners.norm_tuning import NormTuning
from e3va_mm.tuners.partial import Partial

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
