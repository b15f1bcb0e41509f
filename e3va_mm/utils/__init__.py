from .backward import in_backward
from .memory import keep_freed_memory
from .params import count_parameters, mark_trainable
from .process_group import end_process_group
from .values import is_number, is_whole

__all__ = [
    'count_parameters',
    'end_process_group',
    'in_backward',
    'is_number',
    'is_whole',
    'keep_freed_memory',
    'mark_trainable',
]
