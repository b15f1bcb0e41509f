from .backward import in_backward
from .memory import keep_freed_memory
from .params import count_parameters, mark_trainable
from .values import is_number, is_whole

__all__ = [
    'count_parameters',
    'in_backward',
    'is_number',
    'is_whole',
    'keep_freed_memory',
    'mark_trainable',
]
