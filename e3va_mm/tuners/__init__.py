from e3va_mm.tuners.adapter import Adapter, AdapterOptions
from e3va_mm.tuners.adaptformer import AdaptFormer, AdaptFormerOptions
from e3va_mm.tuners.base import BlockOptions, Tuner
from e3va_mm.tuners.beside import (
    DTL,
    LST,
    PMT,
    AdaTAD,
    AdaTADOptions,
    DTLOptions,
    LoSA,
    LoSAOptions,
    LSTOptions,
    PMTOptions,
    R2Tuning,
    R2TuningOptions,
    ResTuning,
    ResTuningOptions,
    SpatialPrior,
    SpatialPriorOptions,
    ViTSplit,
    ViTSplitOptions,
)
from e3va_mm.tuners.bitfit import BitFit, BitFitOptions
from e3va_mm.tuners.e3va import (
    E3VA,
    E3VAFusion,
    E3VAFusionOptions,
    E3VAMix,
    E3VAMixOptions,
    E3VAOptions,
    NoSidePath,
    SidePath,
    SidePathOptions,
)
from e3va_mm.tuners.frozen import Frozen
from e3va_mm.tuners.full import Full
from e3va_mm.tuners.lora import LoRA, LoRAOptions
from e3va_mm.tuners.lorand import LoRand, LoRandOptions
from e3va_mm.tuners.mona import Mona, MonaOptions
from e3va_mm.tuners.norm_tuning import NormTuning
from e3va_mm.tuners.partial import Partial, PartialOptions

__all__ = [
    'PMT',
    'PMTOptions',
    'SpatialPrior',
    'SpatialPriorOptions',
    'ViTSplit',
    'ViTSplitOptions',
    'AdaTAD',
    'AdaTADOptions',
    'DTL',
    'DTLOptions',
    'LST',
    'LSTOptions',
    'LoSA',
    'LoSAOptions',
    'R2Tuning',
    'R2TuningOptions',
    'ResTuning',
    'ResTuningOptions',
    'AdaptFormer',
    'AdaptFormerOptions',
    'Adapter',
    'AdapterOptions',
    'BitFit',
    'BitFitOptions',
    'BlockOptions',
    'E3VA',
    'E3VAFusion',
    'E3VAFusionOptions',
    'E3VAMix',
    'E3VAMixOptions',
    'E3VAOptions',
    'Frozen',
    'Full',
    'LoRA',
    'LoRAOptions',
    'LoRand',
    'LoRandOptions',
    'Mona',
    'MonaOptions',
    'NoSidePath',
    'NormTuning',
    'Partial',
    'PartialOptions',
    'SidePath',
    'SidePathOptions',
    'Tuner',
]
