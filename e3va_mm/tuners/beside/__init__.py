from e3va_mm.tuners.beside.adatad import AdaTAD, AdaTADOptions
from e3va_mm.tuners.beside.dtl import DTL, DTLOptions
from e3va_mm.tuners.beside.losa import LoSA, LoSAOptions
from e3va_mm.tuners.beside.lst import LST, LSTOptions
from e3va_mm.tuners.beside.pmt import PMT, PMTOptions
from e3va_mm.tuners.beside.r2_tuning import R2Tuning, R2TuningOptions
from e3va_mm.tuners.beside.res_tuning import ResTuning, ResTuningOptions
from e3va_mm.tuners.beside.spatial_prior import (
    SpatialPrior,
    SpatialPriorOptions,
)
from e3va_mm.tuners.beside.vit_split import ViTSplit, ViTSplitOptions

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
]
