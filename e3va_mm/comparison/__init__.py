from e3va_mm.comparison.jobs import Jobs
from e3va_mm.comparison.methods import (
    METHODS,
    SIDE_PATHS,
    method_config,
    run_config,
)
from e3va_mm.comparison.records import Records, Run
from e3va_mm.comparison.report import draw, markdown

__all__ = [
    'METHODS',
    'SIDE_PATHS',
    'Jobs',
    'Records',
    'Run',
    'draw',
    'markdown',
    'method_config',
    'run_config',
]
