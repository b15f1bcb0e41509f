from .methods import METHODS, SIDE_PATHS, method_config, run_config
from .records import Records, Run
from .report import draw, markdown

__all__ = [
    'METHODS',
    'SIDE_PATHS',
    'Records',
    'Run',
    'draw',
    'markdown',
    'method_config',
    'run_config',
]
