from e3va_mm.sweep.curves import scalars
from e3va_mm.sweep.measured_step import SharedStep
from e3va_mm.sweep.records import SweepRecords
from e3va_mm.sweep.report import draw, markdown
from e3va_mm.sweep.settings import (
    Setting,
    check_together,
    setting_config,
    settings_of,
)
from e3va_mm.sweep.training import train_together, turns_of

__all__ = [
    'Setting',
    'SharedStep',
    'SweepRecords',
    'check_together',
    'draw',
    'markdown',
    'scalars',
    'setting_config',
    'settings_of',
    'train_together',
    'turns_of',
]
